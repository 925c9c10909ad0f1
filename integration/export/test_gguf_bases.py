"""GGUF bases of every type and family run in llama.cpp once they are written back."""

import pytest
from support.adapters import RANK, qalora_tensors, write_adapter
from support.gguf_files import write_gguf

from qalora_plugin import export_model, merge_adapter
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.verify.export import verify_export

TYPES = [("llama", kind) for kind in ("Q4_1", "Q5_1", "Q4_0", "Q5_0")]
FAMILIES = [(family, "Q4_1") for family in ("qwen2", "qwen3", "gemma", "gemma2", "gemma3")]


@pytest.mark.parametrize(("family", "kind"), TYPES + FAMILIES)
def test_written_back(family, kind, env_python, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", family=family, kind=kind)
    layers = open_quantized(file).layers
    config = {
        "peft_type": "QALORA",
        "base_model_name_or_path": str(file),
        "r": RANK,
        "lora_alpha": 2,
        "target_modules": sorted(layers),
        "adapt": "zeros",
    }
    adapter = write_adapter(tmp_path / "adapter", config, qalora_tensors(layers))
    merged = merge_adapter(adapter, tmp_path / "merged").out
    out = export_model(merged, tmp_path / "again.gguf", "original").out
    report = verify_export(out, merged, run=True, python=env_python("export"))
    assert report.layers == 14 and report.largest_error == 0
    assert report.runtime is not None and report.runtime.not_run is None
    print(report.as_text())
