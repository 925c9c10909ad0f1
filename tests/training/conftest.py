"""Tiny trainings: a Llama of two layers, byte-like tokens, a few steps."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.training import TRAINING
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from qalora_plugin import QALoRAConfig, QALoRAQuantConfig

STOCK = Path(__file__).parent.parent / "fixtures" / "gptq_4bit_g128_actorder_asym"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A base that is not on disk must not be looked for on the network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(STOCK)


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Directories of a base: 16-bit, quantized by us, and stock GPTQ (act-order, asymmetric)."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "dense")
    quantized = AutoModelForCausalLM.from_pretrained(
        root / "dense", quantization_config=QALoRAQuantConfig(bits=4, group_size=32)
    )
    quantized.save_pretrained(root / "ours")
    return {"dense": root / "dense", "ours": root / "ours", "stock": STOCK}


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """Build an SFTTrainer; keywords of SFTConfig, and `data`, `callbacks`, `adapter`, `run`."""

    def make(
        model,
        *,
        data=None,
        eval_data=None,
        callbacks=None,
        adapter="default",
        run="run",
        **settings,
    ):
        if adapter == "default":
            adapter = QALoRAConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM")
        defaults = {**TRAINING, "output_dir": str(tmp_path / run)}
        return SFTTrainer(
            str(model) if isinstance(model, Path) else model,
            args=SFTConfig(**{**defaults, **settings}),
            train_dataset=data or texts(16),
            eval_dataset=eval_data,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=callbacks,
        )

    return make


def texts(rows):
    """Rows of text."""
    return Dataset.from_dict({"text": [f"row {i}: one two three four" for i in range(rows)]})


@pytest.fixture
def text_rows():
    """`texts`."""
    return texts


@pytest.fixture
def pairs():
    """Rows of prompt and completion."""
    return Dataset.from_dict(
        {
            "prompt": [f"what is {i}?" for i in range(8)],
            "completion": [f" it is {i} and more" for i in range(8)],
        }
    )
