"""Peak memory of real training runs beside what `qalora plan` says.

    python integration/plan/measure.py                     every case -> results/plan.json
    python integration/plan/measure.py llama/qalora        the cases whose name starts so
    python integration/plan/measure.py --device cuda
    python integration/plan/measure.py --allocator default llama

Every case is a process of its own: random weights, three steps of transformers' Trainer, and the
peak of the resident memory (VmHWM; on a GPU the allocator's peak) over what the process had after
its imports. The weights' own making is not counted. Linux only.

Each case runs three times: what glibc's malloc keeps of freed blocks depends on addresses, which
differ from run to run. `--allocator mmap` sets MALLOC_MMAP_THRESHOLD_ to 64 KiB, with which it
keeps none; the prediction is then without the plan's "allocator" part, and nothing is recorded.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"
STEPS = 3
REPEATS = 3
RANK = 16

MODELS: dict[str, dict[str, Any]] = {
    # 59M parameters
    "llama": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    # 129M, grouped-query attention, norms on queries and keys, tied embeddings
    "qwen3": {
        "model_type": "qwen3",
        "vocab_size": 50000,
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    # 42M, most of it a large vocabulary; biases
    "qwen2": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # 70M: one projection for queries, keys and values, layer norms, GELU
    "gpt_neox": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    },
    # 75M, norms after the sublayers; measured after the planner was finished, as the next
    "olmo2": {
        "model_type": "olmo2",
        "vocab_size": 50272,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "pad_token_id": 1,
    },
    # 76M: two norms a layer more, GeGLU, embeddings scaled and tied, sliding windows
    "gemma3_text": {
        "model_type": "gemma3_text",
        "vocab_size": 64000,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}
"""config.json of each model."""

RUNS: dict[str, dict[str, Any]] = {
    "llama": {"dtype": "float32", "seq_len": 512, "micro_batch": 2},
    "qwen3": {"dtype": "bfloat16", "seq_len": 512, "micro_batch": 2},
    "qwen2": {"dtype": "float32", "seq_len": 256, "micro_batch": 2},
    "gpt_neox": {"dtype": "float32", "seq_len": 256, "micro_batch": 4},
    "olmo2": {"dtype": "bfloat16", "seq_len": 384, "micro_batch": 3},
    "gemma3_text": {"dtype": "float32", "seq_len": 320, "micro_batch": 2},
}


def cases() -> dict[str, dict[str, Any]]:
    """Every case: {name: options}."""
    found = {}
    for model, run in RUNS.items():
        for method in ("qalora", "lora") if model == "llama" else ("qalora",):
            for checkpointing in (False, True):
                name = f"{model}/{method}{'/checkpointing' if checkpointing else ''}"
                found[name] = {
                    "model": model,
                    "method": method,
                    "adapt": "both" if model == "qwen3" else "zeros",
                    "gradient_checkpointing": checkpointing,
                    **run,
                }
    return found


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def settings_of(case: dict[str, Any], device: str) -> Any:
    """The case as `PlanSettings`."""
    from qalora_plugin.plan import PlanSettings

    names = ("adapt", "dtype", "seq_len", "micro_batch", "gradient_checkpointing")
    return PlanSettings(r=RANK, device=device, **{name: case[name] for name in names})


def write_config(case: dict[str, Any], directory: Path) -> None:
    """config.json of the case's model."""
    (directory / "config.json").write_text(json.dumps(MODELS[case["model"]]))


def predict(case: dict[str, Any], device: str) -> Any:
    """The plan of the case's method."""
    from qalora_plugin.plan import load_shape, plan_method

    settings = settings_of(case, device)
    with tempfile.TemporaryDirectory() as directory:
        write_config(case, Path(directory))
        return plan_method(case["method"], load_shape(directory, settings), settings)


def measure(case: dict[str, Any], device: str) -> int:
    """Train in this process; returns the peak in bytes over the imports."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    from qalora_kernels import PackedWeight, QuantSpec
    from qalora_plugin import QALoRAConfig
    from qalora_plugin.architecture.selection import linears_in_blocks
    from qalora_plugin.layers.linear import QuantLinear

    baseline = resident_bytes("VmRSS")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        write_config(case, Path(directory))
        config = AutoConfig.from_pretrained(directory)
    dtype = getattr(torch, case["dtype"])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)

    def quantized(linear: nn.Linear) -> QuantLinear:
        n, k = linear.weight.shape
        spec = QuantSpec(4, 32, k, n)
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        scales = torch.full((spec.num_groups, n), 0.01)
        packed = PackedWeight.from_codes(codes, scales, torch.zeros_like(scales), None, spec)
        return QuantLinear.from_packed(packed, linear.bias)

    linears = linears_in_blocks(model)
    if case["method"] == "qalora":
        for name, linear in linears.items():
            model.set_submodule(name, quantized(linear))
        model = get_peft_model(model, QALoRAConfig(r=RANK, adapt=case["adapt"]))
    else:
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules=list(linears)))
    del linears
    rows = STEPS * case["micro_batch"]
    ids = torch.randint(0, config.vocab_size, (rows, case["seq_len"]))
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            directory,
            max_steps=STEPS,
            per_device_train_batch_size=case["micro_batch"],
            gradient_checkpointing=case["gradient_checkpointing"],
            bf16=case["dtype"] == "bfloat16",
            optim="adamw_torch",
            use_cpu=device == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
        )
        trainer = Trainer(model, arguments, train_dataset=data)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            return torch.cuda.max_memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        trainer.train()
    return resident_bytes("VmHWM") - baseline


def run_case(
    name: str, device: str, allocator: str = "default", repeats: int = 1
) -> dict[str, Any]:
    """Measure a case in processes of its own, and compare the median with the plan."""
    command = [sys.executable, __file__, "--device", device, "--in-this-process", name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if allocator == "mmap":
        environment["MALLOC_MMAP_THRESHOLD_"] = environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
    peaks = []
    for _ in range(repeats):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, check=True
        )
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak"])
    planned = predict(cases()[name], device)
    # the allocator's peak, measured on a GPU, is without the context
    left_out = "runtime" if device == "cuda" else "allocator" if allocator == "mmap" else None
    predicted = planned.total - planned.memory.get(left_out, 0)
    measured = round(statistics.median(peaks))
    return {
        **cases()[name],
        "device": device,
        "allocator": allocator,
        "peaks": sorted(peaks),
        "measured": measured,
        "predicted": predicted,
        "error": round(predicted / measured - 1, 4),
        "parts": planned.memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", default="", help="start of the names of cases")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--allocator", choices=("default", "mmap"), default="default")
    parser.add_argument(
        "--repeats", type=int, default=REPEATS, help="of a case (default: %(default)s)"
    )
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        print(json.dumps({"peak": measure(cases()[args.case], args.device)}))
        return
    for name in cases():
        if not name.startswith(args.case):
            continue
        row = run_case(name, args.device, args.allocator, args.repeats)
        print(json.dumps({name: row}), flush=True)
        if args.device == "cpu" and args.allocator == "default":
            # after every case, so that a run may be done in pieces
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            found[name] = row
            ordered = {known: found[known] for known in cases() if known in found}
            RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")


if __name__ == "__main__":
    main()
