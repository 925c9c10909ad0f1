"""Small quantized bases on disk, and adapters for them written as files."""

import pytest
import torch
from support.adapters import PREFIX, RANK, qalora_tensors, write_adapter
from support.directories import edit_scales
from support.models import llama

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.checkpoint.checkpoint import open_quantized


@pytest.fixture(scope="session")
def quantize(tmp_path_factory):
    """Write a model beside its quantized copy, of which the directory is returned."""

    def write(model, scales_dtype=torch.float16, **options):
        out = tmp_path_factory.mktemp("base") / "quantized"
        dense = out.with_name("dense")
        model.save_pretrained(dense)
        config = QALoRAQuantConfig(**{"bits": 4, "group_size": 16} | options)
        type(model).from_pretrained(dense, quantization_config=config).save_pretrained(out)
        edit_scales(out, scales_dtype)
        return out

    return write


@pytest.fixture(scope="session")
def base_dir(quantize):
    """A Llama in 4 bits, groups of 32, the last one of 172 inputs short; with side files."""
    out = quantize(llama().to(torch.bfloat16), group_size=32)
    (out / "tokenizer_config.json").write_text('{"from": "base"}')
    (out / "LICENSE").write_text("a licence")
    (out / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (out / "additional_chat_templates" / f"{name}.jinja").write_text("the base's")
    return out


@pytest.fixture(scope="session")
def dense_dir(base_dir):
    """The 16-bit Llama that `base_dir` was made from."""
    return base_dir.with_name("dense")


@pytest.fixture(scope="session")
def tied_base_dir(quantize):
    """A quantized base whose output embeddings are its input embeddings."""
    return quantize(llama(tie_word_embeddings=True).to(torch.bfloat16), group_size=32)


@pytest.fixture
def make_adapter(tmp_path):
    """Write a QALORA adapter for a base; keywords go into its config."""

    def make(
        base,
        *,
        layers=lambda name: True,
        name="adapter",
        extra=None,
        **config,
    ):
        chosen = {n: spec for n, spec in open_quantized(base).layers.items() if layers(n)}
        values = {
            "peft_type": "QALORA",
            "base_model_name_or_path": str(base),
            "r": RANK,
            "lora_alpha": 6,
            "target_modules": sorted(chosen),
            "adapt": "zeros",
            **config,
        }
        tensors = qalora_tensors(chosen, values["adapt"])
        return write_adapter(tmp_path / name, values, tensors | (extra or {}))

    return make


@pytest.fixture
def make_foreign(tmp_path):
    """Write a LoRA adapter with pooling over `pool` inputs; `use_qalora` as PEFT saves it."""

    def make(base, pool, use_qalora, name="foreign", **more):
        gen = torch.Generator().manual_seed(2)
        tensors, names = {}, []
        for layer, spec in open_quantized(base).layers.items():
            if spec.in_features % pool == 0 or not use_qalora:
                a = 0.1 * torch.randn(RANK, spec.in_features // pool, generator=gen)
                b = 0.1 * torch.randn(spec.out_features, RANK, generator=gen)
                tensors[f"{PREFIX}{layer}.lora_A.weight"] = a
                tensors[f"{PREFIX}{layer}.lora_B.weight"] = b
                names.append(layer)
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(base),
            "r": RANK,
            "lora_alpha": 2,
            "target_modules": sorted(names),
            **({"use_qalora": True, "qalora_group_size": pool} if use_qalora else {}),
            **more,
        }
        return write_adapter(tmp_path / name, config, tensors)

    return make
