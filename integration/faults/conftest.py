"""A base, an adapter and a merged model, and everything that writes something of them."""

import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from datasets import Dataset
from support.random_adapter import random_adapter
from support.training import TRAINING
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qalora_plugin import MergeCallback, QALoRAConfig, merge_adapter, quantize_model
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.formats.export import export_model
from qalora_plugin.quickstart.embedded import base_model_path

FULL = "QALORA_FAULTS" in os.environ  # `make faults` sets 200
TIMES = int(os.environ.get("QALORA_FAULTS", "3"))  # of each fault
EXPORTS = ("torchao", "mlx", "gguf", "lora", "gptq", "compressed-tensors")
NAMES = ("quantize", "merge", "hook", *EXPORTS)
STOCK = Path(__file__).parents[2] / "tests" / "fixtures" / "gptq_4bit_g32_asym"


class Models(NamedTuple):
    """Directories of a 16-bit model, its quantized base, an adapter for it, and both merged; a
    stock GPTQ base with an adapter of its scales merged into it."""

    dense: Path
    base: Path
    adapter: Path
    merged: Path
    stock: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Small models on disk."""
    torch.set_num_threads(1)  # forked processes have no other threads
    folder = tmp_path_factory.mktemp("models")
    names = ("base", "adapter", "merged", "stock")
    found = Models(base_model_path(), *(folder / name for name in names))
    quantize_model(found.dense, found.base, method="rtn", progress=False)
    random_adapter(open_quantized(found.base), found.adapter)
    merge_adapter(found.adapter, found.merged, found.base)
    scales = random_adapter(open_quantized(STOCK), folder / "scales", "scales")
    merge_adapter(scales, found.stock, STOCK)
    return found


@pytest.fixture(scope="session")
def trainer(models, tmp_path_factory):
    """An SFTTrainer that has trained the base for a step."""
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(models.base),
        args=SFTConfig(**TRAINING | {"max_steps": 1}, output_dir=tmp_path_factory.mktemp("run")),
        train_dataset=Dataset.from_dict({"text": ["one two three"] * 4}),
        processing_class=AutoTokenizer.from_pretrained(models.base),
        peft_config=QALoRAConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


def _export(models, out, name):
    source = models.adapter if name == "lora" else models.merged
    if name in ("gptq", "compressed-tensors"):  # which hold integer zero-points
        source = models.stock
    target = out / ("x.gguf" if name == "gguf" else f"x-{name}")
    options = {"base": models.base} if name == "lora" else {}
    return lambda: export_model(source, target, name, **options), target


def _hook(trainer, out):
    def end():
        hook = MergeCallback(out / "h", report=False)
        for event in (hook.on_train_begin, hook.on_train_end):
            event(
                trainer.args,
                trainer.state,
                trainer.control,
                model=trainer.model,
                processing_class=trainer.processing_class,
            )

    return end, out / "h"


@pytest.fixture(scope="session")
def action_of(models, request):
    """`action_of(name, out)`: what writes something below `out`, and where: (function, target)."""

    def find(name, out):
        if name == "quantize":
            target = out / "q"
            return lambda: quantize_model(
                models.dense, target, method="rtn", progress=False
            ), target
        if name == "merge":
            return lambda: merge_adapter(models.adapter, out / "m", models.base), out / "m"
        if name == "hook":
            return _hook(request.getfixturevalue("trainer"), out)
        return _export(models, out, name)

    return find


@pytest.fixture
def draw():
    """A random generator whose draws are the same in every run."""
    return random.Random(int(os.environ.get("QALORA_SEED", "0")))


@pytest.fixture
def show(capfd):
    """`show(text)`: print a count past pytest's capturing, so that every run says what it did."""

    def write(text):
        with capfd.disabled():
            print(f"\n{text}", file=sys.stderr)

    return write
