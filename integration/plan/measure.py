"""Measure the allocated peak of real training runs beside what `qalora plan` says.

    python integration/plan/measure.py                     every case -> results/plan.json
    python integration/plan/measure.py llama/qalora        the cases whose name starts so
    python integration/plan/measure.py --device cuda       on a GPU; prints, records nothing

Every case is a process of its own: random weights and three steps of transformers' Trainer. The
peak is torch's own count: on the CPU from the profiler's events of all allocations and frees, on a
GPU `max_memory_allocated`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from qalora_kernels import PackedWeight, QuantSpec
from qalora_plugin import QALoRAConfig
from qalora_plugin.architecture.selection import linears_in_blocks
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.plan import PlanSettings, load_shape, plan_method

RESULTS = Path(__file__).parent / "results" / "plan.json"
STEPS = 3
RANK = 16

# keys of config.json, and settings of the run
CONFIG = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
CONFIG += ("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings")
RUN = ("dtype", "seq_len", "micro_batch", "adapt")
# their values for models of 42M to 129M weights: grouped queries (qwen3), biases and a vocabulary
# that is most of it (qwen2), layer norms (gpt_neox), norms after sublayers (olmo2), sliding windows
MODELS: dict[str, tuple[Any, ...]] = {
    "llama": (32000, 512, 1408, 8, 8, 8, 64, False, "float32", 512, 2, "zeros"),
    "qwen3": (50000, 768, 2304, 12, 12, 4, 64, True, "bfloat16", 512, 2, "both"),
    "qwen2": (151936, 256, 768, 4, 4, 2, 64, True, "float32", 256, 2, "zeros"),
    "gpt_neox": (50304, 512, 2048, 6, 8, 8, 64, False, "float32", 256, 4, "zeros"),
    "olmo2": (50272, 512, 1536, 10, 8, 8, 64, False, "bfloat16", 384, 3, "zeros"),
    "gemma3_text": (64000, 640, 2048, 8, 4, 1, 128, True, "float32", 320, 2, "zeros"),
}
RUNS = ["llama/lora", *(f"{model}/qalora" for model in MODELS)]
NAMES = [run + more for run in RUNS for more in ("", "/checkpointing")]


def load_case(name, device):
    """Return a case's method, `ModelShape` and `PlanSettings`."""
    model, method, *checkpointing = name.split("/")
    values = dict(zip(CONFIG + RUN, MODELS[model], strict=True))
    config = {"model_type": model, "pad_token_id": 1, **{key: values[key] for key in CONFIG}}
    run = {key: values[key] for key in RUN}
    run["gradient_checkpointing"] = bool(checkpointing)
    settings = PlanSettings(r=RANK, device=device, **run)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(config))
        return method, load_shape(directory, settings), settings


def predict(name, device):
    """Return the allocated bytes that the plan expects; the CUDA context is not among them."""
    planned = plan_method(*load_case(name, device))
    return planned.total - planned.memory["runtime"]


def make_trainer(name, device):
    """Return a Trainer of the case's model with random weights and data."""
    method, shape, settings = load_case(name, device)
    model = AutoModelForCausalLM.from_config(shape.config, dtype=settings.torch_dtype)
    linears = linears_in_blocks(model)
    config = LoraConfig(r=RANK, target_modules=list(linears))
    if method == "qalora":
        for layer, linear in linears.items():
            spec = QuantSpec(4, 32, linear.in_features, linear.out_features)
            codes = torch.randint(0, 16, tuple(linear.weight.shape), dtype=torch.uint8)
            grid = torch.full((2, spec.num_groups, spec.out_features), 0.01)
            packed = PackedWeight.from_codes(codes, *grid, None, spec)
            quantized = QuantLinear.from_packed(packed, linear.bias)
            model.set_submodule(layer, quantized)
        config = QALoRAConfig(r=RANK, adapt=settings.adapt)
    arguments = TrainingArguments(
        tempfile.gettempdir(),  # nothing is written
        max_steps=STEPS,
        per_device_train_batch_size=settings.micro_batch,
        gradient_checkpointing=settings.gradient_checkpointing,
        bf16=settings.dtype == "bfloat16",
        optim="adamw_torch",
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = (STEPS * settings.micro_batch, settings.seq_len)
    ids = torch.randint(0, shape.config.vocab_size, rows)
    data = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(get_peft_model(model, config), arguments, train_dataset=data)


def allocated_peak(trainer, device):
    """Train; return the most bytes in tensors at one time, the model's among them."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        trainer.train()
        return torch.cuda.max_memory_allocated()
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    live = peak = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def run_case(name, device):
    """Measure a case in a process of its own, and compare it with the plan."""
    command = [sys.executable, __file__, "--device", device, "--in-this-process", name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    measured, predicted = int(done.stdout.splitlines()[-1]), predict(name, device)
    error = predicted / measured - 1
    return {"measured": measured, "predicted": predicted, "error": round(error, 4)}


def main():
    """Measure the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", default="", help="start of the names of cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        print(allocated_peak(make_trainer(args.case, args.device), args.device))
        return
    for name in filter(lambda name: name.startswith(args.case), NAMES):
        row = run_case(name, args.device)
        print(json.dumps({name: row}), flush=True)
        if args.device == "cpu":  # after every case, so that a run may be done in pieces
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps({**found, name: row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
