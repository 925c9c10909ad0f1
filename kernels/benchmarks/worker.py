"""One variant of a training run in a process of its own; `training.py` starts it and talks to it.

    python worker.py '{"task": "step", "variant": "lora", "device": "cpu", ...}'

Its answers are lines of JSON. "task": "step" answers when the model stands, and then each line of
stdin: `time` runs a forward and a backward, `memory` reports. "sft" answers when SFTTrainer has
ended. It imports torch, transformers and PEFT, and only what its own variant needs, so that it runs
in another program's environment as well.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measure import first_line
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

Spec = dict[str, Any]
Answer = Callable[..., None]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 5  # steps of SFTTrainer


# ---- memory


def resident_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def reset_peak(device: str) -> None:
    """Forget the memory that building took."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: str) -> int:
    """Return the peak since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")


def storages(tensors: Any) -> dict[int, int]:
    """Return the bytes of each storage behind some tensors, by address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def weights(model: nn.Module) -> dict[int, int]:
    """Return the storages of a model with its adapters."""
    return storages([*model.parameters(), *model.buffers()])


def saved_bytes(model: nn.Module, step: Callable[[], Any]) -> int:
    """Return what autograd keeps for the backward of a step, without the model's own."""
    own, saved = weights(model), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(size for address, size in saved.items() if address not in own)


def allocated_peak_bytes(model: nn.Module, step: Callable[[], Any], device: str) -> int:
    """Return the most bytes in tensors at one time, over a step of its own.

    On a CPU from the events of torch's allocator, which slow the step down.
    """
    model.zero_grad(set_to_none=True)  # as the step does; a free is seen only of what is allocated
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    # a program that compiles also holds tensors without memory: of other types
    held = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    live = peak = sum(storages(held).values())
    del held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


# ---- the variants: each puts its linear layers and adapters into a bf16 model of random weights


def random_llama(spec: Spec) -> LlamaForCausalLM:
    """Return a bf16 Llama on the device of `spec`; speed does not depend on the weights."""
    config = LlamaConfig(
        hidden_size=spec["hidden"],
        intermediate_size=spec["intermediate"],
        num_hidden_layers=spec["layers"],
        num_attention_heads=spec["heads"],
        num_key_value_heads=spec.get("kv_heads", spec["heads"]),
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
    return model


def replace_linears(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace the linear layers of the decoder, one at a time."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name in TARGETS:
                setattr(module, name, make(child))


def frozen(model: nn.Module, spec: Spec) -> nn.Module:
    """Add no adapter: what the dense matrix products alone cost."""
    return model.requires_grad_(False)


def lora(model: nn.Module, spec: Spec, fp32: bool = False, **more: Any) -> nn.Module:
    """Add PEFT's LoRA with bf16 adapters, its fastest form, or fp32 ones, as PEFT makes them."""
    config = LoraConfig(r=spec["r"], lora_alpha=16, target_modules=TARGETS, **more)
    return get_peft_model(model, config, autocast_adapter_dtype=fp32)


def qalora(model: nn.Module, spec: Spec, adapt: str = "zeros") -> nn.Module:
    """Add QA-LoRA, folded, of the offsets, as in the paper, of the scales, or of both."""
    from operators import random_weight

    from qalora_kernels import QuantSpec
    from qalora_plugin import QALoRAConfig
    from qalora_plugin.layers.linear import QuantLinear

    def make(linear: nn.Linear) -> nn.Module:
        shape = (linear.in_features, linear.out_features)
        grid = QuantSpec(spec["bits"], spec["group_size"], *shape)
        return QuantLinear.from_packed(random_weight(grid, linear.weight.device))

    replace_linears(model, make)
    return get_peft_model(model, QALoRAConfig(r=spec["r"], lora_alpha=16, adapt=adapt))


def use_qalora(model: nn.Module, spec: Spec, fp32: bool = False) -> nn.Module:
    """Add PEFT's `use_qalora` on GPTQModel's torch kernel; adapters as in `lora`."""
    from gptqmodel.nn_modules.qlinear.torch import TorchQuantLinear

    grid = {"bits": spec["bits"], "group_size": spec["group_size"], "sym": False, "desc_act": False}

    def make(linear: nn.Linear) -> nn.Module:
        shape = {"in_features": linear.in_features, "out_features": linear.out_features}
        layer = TorchQuantLinear(**grid, **shape)
        for name in ("qweight", "qzeros"):
            getattr(layer, name).random_(-(2**31), 2**31 - 1)
        layer.scales = torch.full_like(layer.scales, 0.02, dtype=torch.bfloat16)
        layer.to(linear.weight.device)
        layer.post_init()
        return layer

    replace_linears(model, make)
    model = lora(model, spec, True, use_qalora=True, qalora_group_size=spec["group_size"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            # GPTQModel turns torch's initialisations off, and has no weight to take a dtype from
            parameter.data.uniform_(-0.03, 0.03)
            parameter.data = parameter.data.to(torch.float32 if fp32 else torch.bfloat16)
    return model


def qlora_nf4(model: nn.Module, spec: Spec) -> nn.Module:
    """Add QLoRA: PEFT's LoRA on NF4 of bitsandbytes."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    def make(linear: nn.Linear) -> nn.Module:
        k, n = linear.in_features, linear.out_features
        layer = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        weight = linear.weight.data.cpu()
        layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
        return layer.to(linear.weight.device)  # this quantizes

    replace_linears(model, make)
    model.is_loaded_in_4bit = True  # PEFT asks the model, not the layers, whether it is quantized
    return lora(model, spec)


VARIANTS: dict[str, Callable[[nn.Module, Spec], nn.Module]] = {
    "qalora": qalora,
    "qalora_scales": partial(qalora, adapt="scales"),
    "qalora_both": partial(qalora, adapt="both"),
    "lora": lora,
    "lora_fp32": partial(lora, fp32=True),
    "frozen": frozen,
    "use_qalora": use_qalora,
    "use_qalora_fp32": partial(use_qalora, fp32=True),
    "qlora_nf4": qlora_nf4,
}


def build(spec: Spec) -> nn.Module:
    """Return the model of a step or a decoder layer."""
    return VARIANTS[spec["variant"]](random_llama(spec), spec).train()


def load(spec: Spec) -> tuple[nn.Module, LoraConfig]:
    """Return the base and the adapter's config, as a user gives them to SFTTrainer."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16}
    config = LoraConfig
    if spec["variant"] == "qalora":
        from qalora_plugin import QALoRAConfig, QALoRAQuantConfig

        quantization = QALoRAQuantConfig(bits=spec["bits"], group_size=spec["group_size"])
        options["quantization_config"], config = quantization, QALoRAConfig
    elif spec["variant"] == "qlora_nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if spec["device"] == "cuda":
        options["device_map"] = {"": 0}
    model = AutoModelForCausalLM.from_pretrained(spec["model"], **options)
    common = {"lora_alpha": 16, "task_type": "CAUSAL_LM", "target_modules": TARGETS}
    return model, config(r=spec["r"], **common)


# ---- the two tasks


def run_steps(spec: Spec, answer: Answer) -> None:
    """Run a forward and a backward for each `time`.

    Gradients reach the embeddings' output in every variant, as with gradient checkpointing and as
    for every layer of a deeper model.
    """
    device = spec["device"]
    base = resident_bytes("VmRSS") if device == "cpu" else 0
    model = build(spec)
    ids = torch.randint(0, spec["vocab"], (spec["batch"], spec["sequence"]), device=device)
    embedded = model.get_input_embeddings()(ids).detach()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss = model(inputs_embeds=embedded.clone().requires_grad_(), labels=ids).loss
        loss.backward()
        loss.item()  # waits for the GPU

    if device == "cpu":
        torch.set_num_threads(spec["threads"])  # a library may have changed it
    answer(weight_bytes=sum(weights(model).values()), peer_torch=torch.__version__)
    reset_peak(device)
    for line in sys.stdin:
        if line.strip() == "time":
            begin = time.perf_counter()
            step()
            answer(seconds=time.perf_counter() - begin)
            continue
        answer(
            peak_bytes=peak_bytes(device) - base,
            allocated_peak_bytes=allocated_peak_bytes(model, step, device),
            saved_bytes=saved_bytes(model, step),
            adapter_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        )


def run_sft(spec: Spec, answer: Answer) -> None:
    """Train with TRL's SFTTrainer on one batch again and again: its loss must fall at once."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device, steps = spec["device"], WARM_UP + spec["rounds"]
    ids = [[3 + i % 256 for i in range(spec["sequence"])]] * (spec["batch"] * steps)
    ends: list[float] = []
    without_gradient: list[str] = []

    class Watch(TrainerCallback):
        """Times the steps, and looks at every gradient once (A has none while B is zero)."""

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARM_UP - 1:
                for name, parameter in kwargs["model"].named_parameters():
                    grad = parameter.grad
                    if parameter.requires_grad and (grad is None or not grad.any()):
                        without_gradient.append(name)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            if state.global_step == WARM_UP:  # compiled; the optimizer has its states
                reset_peak(device)
            ends.append(time.perf_counter())

    model, adapter = load(spec)
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=steps,
        per_device_train_batch_size=spec["batch"],
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_length=spec["sequence"],
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model,
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=AutoTokenizer.from_pretrained(spec["tokenizer"]),
        peft_config=adapter,
        callbacks=[Watch()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    answer(
        seconds=[end - begin for begin, end in pairwise(ends[WARM_UP - 1 :])],
        first_loss=losses[0],
        last_loss=losses[-1],
        without_gradient=without_gradient,
        peak_bytes=peak_bytes(device),
        weight_bytes=sum(weights(trainer.model).values()),
    )


def main() -> None:
    spec = json.loads(sys.argv[1])
    # answers go to a copy of stdout, which libraries that print cannot reach
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers)

    if spec["device"] == "cpu":
        torch.set_num_threads(spec["threads"])
    try:
        {"step": run_steps, "sft": run_sft}[spec["task"]](spec, answer)
    except Exception as error:
        answer(error=first_line(error))


if __name__ == "__main__":
    main()
