"""Small quantized bases on disk, and adapters for them written as files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import open_quantized

FIXTURES = Path(__file__).parent.parent / "fixtures"
PREFIX = "base_model.model."
RANK = 4


def _save_llama(directory: Path, tied: bool = False) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16-bit Llama of two layers, 172 inputs in one of its projections."""
    directory = tmp_path_factory.mktemp("dense") / "model"
    _save_llama(directory)
    return directory


@pytest.fixture(scope="session")
def quantize_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a quantized copy of a 16-bit directory."""

    def quantize(dense: Path, **options: Any) -> Path:
        out = tmp_path_factory.mktemp("base") / "quantized"
        config = QALoRAQuantConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=config)
        model.save_pretrained(out)
        (out / "tokenizer_config.json").write_text('{"from": "base"}')
        (out / "LICENSE").write_text("a licence")
        (out / "additional_chat_templates").mkdir()
        for name in ("rag", "tool_use"):
            (out / "additional_chat_templates" / f"{name}.jinja").write_text("the base's")
        return out

    return quantize


@pytest.fixture(scope="session")
def base_dir(dense_dir: Path, quantize_dir: Callable[..., Path]) -> Path:
    """The same, quantized: 4 bits, groups of 32, the last group of 172 inputs short."""
    return quantize_dir(dense_dir, bits=4, group_size=32)


@pytest.fixture(scope="session")
def tied_base_dir(
    tmp_path_factory: pytest.TempPathFactory, quantize_dir: Callable[..., Path]
) -> Path:
    """A quantized base whose output embeddings are its input embeddings."""
    directory = tmp_path_factory.mktemp("tied") / "model"
    _save_llama(directory, tied=True)
    return quantize_dir(directory, bits=4, group_size=32)


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Write a QALORA adapter for a base; keywords go into its config."""

    def make(
        base: Path,
        *,
        layers: Callable[[str], bool] = lambda name: True,
        name: str = "adapter",
        extra: dict[str, torch.Tensor] | None = None,
        **config: Any,
    ) -> Path:
        gen = torch.Generator().manual_seed(1)
        adapt = config.get("adapt", "zeros")
        tensors = dict(extra or {})
        chosen = {n: s for n, s in open_quantized(base).layers.items() if layers(n)}
        for layer, spec in chosen.items():
            for part, a, b in (
                ("zeros", "qalora_A", "qalora_B"),
                ("scales", "qalora_scale_A", "qalora_scale_B"),
            ):
                if adapt in (part, "both"):
                    shapes = {a: (RANK, spec.num_groups), b: (spec.out_features, RANK)}
                    for matrix, shape in shapes.items():
                        values = 0.1 * torch.randn(shape, generator=gen)
                        tensors[f"{PREFIX}{layer}.{matrix}.weight"] = values
        values = {
            "peft_type": "QALORA",
            "base_model_name_or_path": str(base),
            "r": RANK,
            "lora_alpha": 6,
            "target_modules": sorted(chosen),
            "adapt": adapt,
            **config,
        }
        return write_adapter(tmp_path / name, values, tensors)

    return make


@pytest.fixture
def make_foreign(tmp_path: Path) -> Callable[..., Path]:
    """Write a LoRA adapter with pooling over `pool` inputs; `use_qalora` as PEFT saves it."""

    def make(base: Path, pool: int, use_qalora: bool, name: str = "foreign", **more: Any) -> Path:
        gen = torch.Generator().manual_seed(2)
        tensors = {}
        for layer, spec in open_quantized(base).layers.items():
            if spec.in_features % pool == 0 or not use_qalora:
                a = 0.1 * torch.randn(RANK, spec.in_features // pool, generator=gen)
                b = 0.1 * torch.randn(spec.out_features, RANK, generator=gen)
                tensors[f"{PREFIX}{layer}.lora_A.weight"] = a
                tensors[f"{PREFIX}{layer}.lora_B.weight"] = b
        names = [k.removeprefix(PREFIX).removesuffix(".lora_A.weight") for k in tensors]
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(base),
            "r": RANK,
            "lora_alpha": 2,
            "target_modules": sorted(n for n in names if not n.endswith("lora_B.weight")),
            **({"use_qalora": True, "qalora_group_size": pool} if use_qalora else {}),
            **more,
        }
        return write_adapter(tmp_path / name, config, tensors)

    return make


def write_adapter(directory: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """Write an adapter directory."""
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def edit_tensors() -> Callable[..., None]:
    """Change the tensors of a safetensors file: edit_tensors(path, function of the dict)."""
    return _edit_tensors


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change a JSON file: edit_json(path, key=value, ...); a value of None removes the key."""

    def edit(path: Path, **changes: Any) -> None:
        values = json.loads(path.read_text())
        for key, value in changes.items():
            values.pop(key, None)
            if value is not None:
                values[key] = value
        path.write_text(json.dumps(values))

    return edit


@pytest.fixture
def stock_dir() -> Callable[[str], Path]:
    """A stock GPTQ checkpoint among the fixtures."""

    def find(name: str) -> Path:
        return FIXTURES / name

    return find
