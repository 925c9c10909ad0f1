"""Without the plugin, transformers must refuse our checkpoints: never a model of random layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.quickstart.embedded import base_model_path

LOADER = Path(__file__).with_name("load_without_plugin.py")


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base, INT4."""
    out = tmp_path_factory.mktemp("guard") / "int4"
    config = QALoRAQuantConfig(bits=4, group_size=32)
    AutoModelForCausalLM.from_pretrained(
        base_model_path(), quantization_config=config
    ).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT-type encoder, INT4."""
    folder = tmp_path_factory.mktemp("guard-bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
    )
    BertModel(config).save_pretrained(folder / "dense")
    BertModel.from_pretrained(
        folder / "dense", quantization_config=QALoRAQuantConfig(bits=4, group_size=32)
    ).save_pretrained(folder / "int4")
    return folder / "int4"


@pytest.mark.parametrize("environment", ["bare", "newest"])
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_stock_transformers_refuses(
    environment: str,
    kind: str,
    request: pytest.FixtureRequest,
    env_python: Callable[[str], Path],
    run_json: Callable[..., Any],
) -> None:
    directory = request.getfixturevalue(kind)
    auto = "AutoModelForCausalLM" if kind == "causal" else "AutoModel"
    result = run_json(env_python(environment), LOADER, directory, auto)
    assert result["raised"], f"transformers {result['transformers']} returned a model"
    assert "size mismatch" in result["raised"] or "mismatch" in result["raised"], result["raised"]


def test_a_dense_model_still_loads_there(
    env_python: Callable[[str], Path], run_json: Callable[..., Any]
) -> None:
    # otherwise the refusals above could come from a broken environment
    result = run_json(env_python("bare"), LOADER, base_model_path())
    assert result["raised"] is None
