"""One variant of a training step in a process of its own; `steps.py` starts it and talks to it.

    python step_worker.py '{"variant": "lora", "device": "cpu", ...}'

Reads commands, one a line: `step` runs a forward and a backward, `memory` reports. Answers are JSON
lines. It imports torch, transformers and PEFT, and only what its own variant needs, so that it
runs in another program's environment as well. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process (Linux)."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak(device: str) -> None:
    """Forget the memory that building took."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")


def peak_bytes(device: str) -> int:
    """Peak since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")


# ---- the variants: each puts its linear layers and adapters into a bf16 model


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace the linear layers of the decoder, one at a time."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in TARGETS:
                setattr(module, name, make(child))


def lora_config(spec: dict[str, Any], **more: Any) -> LoraConfig:
    return LoraConfig(r=spec["r"], lora_alpha=16, target_modules=TARGETS, **more)


def frozen(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """No adapter: what the dense matrix products alone cost."""
    return model.requires_grad_(False)


def lora(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """PEFT LoRA with bf16 adapters, its fastest form."""
    return get_peft_model(model, lora_config(spec), autocast_adapter_dtype=False)


def lora_fp32(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """PEFT LoRA as PEFT makes it of a bf16 model: fp32 adapters."""
    return get_peft_model(model, lora_config(spec))


def qalora(model: nn.Module, spec: dict[str, Any], adapt: str = "zeros") -> nn.Module:
    """QA-LoRA, folded: offsets, as in the paper."""
    from qalora_kernels import PackedWeight, QuantSpec
    from qalora_plugin import QALoRAConfig
    from qalora_plugin.layers.linear import QuantLinear

    def make(linear: nn.Linear) -> nn.Module:
        k, n = linear.in_features, linear.out_features
        grid = QuantSpec(spec["bits"], spec["group_size"], k, n)
        codes = torch.randint(0, 1 << spec["bits"], (n, k), dtype=torch.uint8)
        scales = torch.full((grid.num_groups, n), 0.02)
        packed = PackedWeight.from_codes(codes, scales, torch.zeros_like(scales), None, grid)
        return QuantLinear.from_packed(packed).to(linear.weight.device)

    replace_linears(model, make)
    config = QALoRAConfig(r=spec["r"], lora_alpha=16, adapt=adapt)
    return get_peft_model(model, config)


def qalora_scales(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """QA-LoRA of the scales."""
    return qalora(model, spec, "scales")


def qalora_both(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """QA-LoRA of scales and offsets."""
    return qalora(model, spec, "both")


def on_gptqmodel(model: nn.Module, spec: dict[str, Any], adapters_fp32: bool) -> nn.Module:
    """PEFT's `use_qalora` on GPTQModel's torch kernel."""
    from gptqmodel.nn_modules.qlinear.torch import TorchQuantLinear

    def make(linear: nn.Linear) -> nn.Module:
        layer = TorchQuantLinear(
            bits=spec["bits"],
            group_size=spec["group_size"],
            sym=False,
            desc_act=False,
            in_features=linear.in_features,
            out_features=linear.out_features,
        )
        for name in ("qweight", "qzeros"):
            getattr(layer, name).random_(-(2**31), 2**31 - 1)
        layer.scales = torch.full_like(layer.scales, 0.02, dtype=torch.bfloat16)
        layer.to(linear.weight.device)
        layer.post_init()
        return layer

    replace_linears(model, make)
    config = lora_config(spec, use_qalora=True, qalora_group_size=spec["group_size"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # GPTQModel turns torch's initialisations off, and has no weight to take a dtype from
            parameter.data.uniform_(-0.03, 0.03)
            parameter.data = parameter.data.to(torch.float32 if adapters_fp32 else torch.bfloat16)
    return model


def use_qalora(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """PEFT's `use_qalora` with bf16 adapters, its fastest form."""
    return on_gptqmodel(model, spec, adapters_fp32=False)


def use_qalora_fp32(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """PEFT's `use_qalora` as PEFT makes it: fp32 adapters."""
    return on_gptqmodel(model, spec, adapters_fp32=True)


def qlora_nf4(model: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """QLoRA: PEFT LoRA on bitsandbytes NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    def make(linear: nn.Linear) -> nn.Module:
        k, n = linear.in_features, linear.out_features
        layer = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        weight = Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        layer.weight = weight
        return layer.to(linear.weight.device)  # this quantizes

    replace_linears(model, make)
    # PEFT asks the model, not the layers, whether it is quantized
    model.is_loaded_in_4bit = True
    return get_peft_model(model, lora_config(spec), autocast_adapter_dtype=False)


VARIANTS = {
    f.__name__: f
    for f in (
        frozen,
        lora,
        lora_fp32,
        qalora,
        qalora_scales,
        qalora_both,
        use_qalora,
        use_qalora_fp32,
        qlora_nf4,
    )
}


# ---- the step


def build(spec: dict[str, Any]) -> nn.Module:
    """The model of the step, bf16, on its device."""
    config = LlamaConfig(
        hidden_size=spec["hidden"],
        intermediate_size=spec["intermediate"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        num_key_value_heads=spec["heads"],
        vocab_size=spec["vocab"],
        max_position_embeddings=spec["sequence"],
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(spec["device"]):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return VARIANTS[spec["variant"]](model, spec).train()


def make_step(model: nn.Module, spec: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """A function that runs one forward and backward and returns the loss.

    Gradients reach the embeddings' output in every variant, as with gradient checkpointing and as
    for every layer of a deeper model.
    """
    shape = (spec["batch"], spec["sequence"])
    ids = torch.randint(0, spec["vocab"], shape, device=spec["device"])
    embedded = model.get_input_embeddings()(ids).detach()

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        inputs = embedded.clone().requires_grad_()
        loss = model(inputs_embeds=inputs, labels=ids).loss
        loss.backward()
        return loss.detach()

    return step


@contextlib.contextmanager
def count_saved(model: nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps for the backward, without the model's own."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def held_bytes() -> int:
    """Bytes of the storages of all tensors that exist."""
    real = (torch.Tensor, nn.Parameter)  # a program that compiles also holds tensors without memory
    tensors = [o for o in gc.get_objects() if type(o) in real]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def allocated_peak_bytes(model: nn.Module, step: Callable[[], torch.Tensor], device: str) -> int:
    """Most bytes in tensors at one time, over a step of its own.

    On a CPU from the events of torch's allocator, which slow the step down.
    """
    model.zero_grad(set_to_none=True)  # as the step does; a free is seen only of what is allocated
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    live = peak = held_bytes()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    spec = json.loads(sys.argv[1])
    # answers go to a copy of stdout, which libraries that print cannot reach
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers)

    device = spec["device"]
    if device == "cpu":
        torch.set_num_threads(spec["threads"])
    base = resident_bytes("VmRSS") if device == "cpu" else 0
    try:
        model = build(spec)
        step = make_step(model, spec)
    except Exception as error:
        answer(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return
    if device == "cpu":
        torch.set_num_threads(spec["threads"])  # a library may have changed it
    weights = sum(t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()])
    answer(ready=True, torch=torch.__version__, weight_bytes=weights)
    reset_peak(device)
    for line in sys.stdin:
        if line.strip() == "step":
            start = time.perf_counter()
            loss = step()
            if device == "cuda":
                torch.cuda.synchronize()
            answer(seconds=time.perf_counter() - start, loss=loss.item())
        elif line.strip() == "memory":
            peak = peak_bytes(device) - base
            with count_saved(model) as saved:
                step()
            answer(
                peak_bytes=peak,
                allocated_peak_bytes=allocated_peak_bytes(model, step, device),
                saved_bytes=sum(saved.values()),
                adapter_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
            )


if __name__ == "__main__":
    main()
