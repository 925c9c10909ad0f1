"""An adapter of random numbers for every quantized layer of a base, as training saves one."""

import torch
from safetensors.torch import save_file

from qalora_plugin import QALoRAConfig
from qalora_plugin.checkpoint.fingerprint import fingerprint

PREFIX = "base_model.model."
_PARTS = {"zeros": "qalora_", "scales": "qalora_scale_"}


def random_adapter(
    source,
    out,
    adapt="zeros",
    *,
    rank=4,
    alpha=8,
    size=0.02,
):
    """Write the adapter; `size` is that of B's numbers. Returns `out`."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in source.layers.items():
        for part, start in _PARTS.items():
            if adapt in (part, "both"):
                a = torch.randn(rank, spec.num_groups, generator=generator)
                b = torch.randn(spec.out_features, rank, generator=generator)
                tensors[f"{PREFIX}{name}.{start}A.weight"] = a * 0.02
                tensors[f"{PREFIX}{name}.{start}B.weight"] = b * size
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    QALoRAConfig(
        r=rank,
        lora_alpha=alpha,
        adapt=adapt,
        target_modules=sorted({name.rpartition(".")[2] for name in source.layers}),
        base_model_name_or_path=str(source.directory),
        bits=source.config.bits,
        group_size=source.config.group_size,
        fingerprint=fingerprint((name, source.qweight(name)) for name in source.layers),
        task_type="CAUSAL_LM",
    ).save_pretrained(out)
    return out
