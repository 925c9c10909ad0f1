"""Whole-model training with TRL's SFTTrainer: QA-LoRA beside LoRA and QLoRA, on a random Llama.

    python sft.py --device cuda --output sft.jsonl --variants qalora-4,lora,qlora

Each variant trains in a process of its own and takes its rounds in turn with the others. The model
(1.1B parameters by default, in bf16) is made on the spot and quantized while it loads; the text is
a random language that can be learned, so that losses mean something.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import measure
import record
import steps
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER = Path(__file__).resolve().parents[2] / "qalora_plugin" / "quickstart" / "base_model"
WARM_UP = 1  # rounds
REFERENCE = "qalora-4"

MODELS = {
    "1.1B": {"hidden": 2048, "intermediate": 5632, "layers": 22, "heads": 32, "vocab": 32000},
    "tiny": {"hidden": 64, "intermediate": 96, "layers": 2, "heads": 4, "vocab": 4096},
}


def make_model(shape: dict[str, int], sequence: int, device: str, directory: Path) -> int:
    """Write a random Llama in bf16; returns its number of parameters."""
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"] // 4,
        vocab_size=shape["vocab"],
        max_position_embeddings=sequence,
        tie_word_embeddings=False,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    return model.num_parameters()


def run(spec: dict[str, Any], variants: list[str], rounds: int) -> Iterator[record.Row]:
    """Train all variants, interleaved.

    Args:
        spec: what `sft_worker` reads.
        variants: "qalora-BITS", "lora", "qlora".
        rounds: timed ones; one more goes before them.

    Yields:
        One row a variant, a ratio of seconds "qalora-4 / variant" each, and what could not run.
    """
    base = {"operator": f"SFT {spec['name']}", "M": spec["batch"] * spec["sequence"]}
    workers: dict[str, steps.Worker] = {}
    for variant in variants:
        try:
            workers[variant] = steps.Worker(variant, spec, "sft_worker.py")
        except steps.Unavailable as reason:
            yield base | {"variant": variant, "not_run": str(reason)}
    seconds: dict[str, list[float]] = {variant: [] for variant in workers}
    losses: dict[str, list[float]] = {variant: [] for variant in workers}
    peaks: dict[str, int] = {}
    for command in ["round"] * (WARM_UP + rounds) + ["memory"]:
        for variant, worker in list(workers.items()):
            try:
                answer = worker.ask(command)
            except steps.Unavailable as reason:
                del workers[variant]
                yield base | {"variant": variant, "not_run": str(reason)}
                continue
            if command == "memory":
                peaks[variant] = answer["peak_bytes"]
                worker.close()
            else:
                seconds[variant].append(answer["seconds"] / spec["steps"])
                losses[variant] += answer["losses"]
    seconds = {variant: seconds[variant][WARM_UP:] for variant in workers}
    for variant, times in seconds.items():
        rates = [base["M"] / second for second in times]
        yield base | {
            "variant": variant,
            "rounds": rounds,
            "training": {k: v for k, v in spec.items() if k not in ("model", "tokenizer")},
            "peak_bytes": peaks[variant],
            "weight_bytes": workers[variant].ready["weight_bytes"],
            "first_loss": losses[variant][0],
            "last_loss": round(mean(losses[variant][-spec["steps"] :]), 4),
            **measure.spread(times, "seconds"),
            **measure.spread(rates, "tokens_per_second"),
        }
    for variant, times in seconds.items():
        if variant != REFERENCE and REFERENCE in seconds:
            numbers = measure.ratio(seconds[REFERENCE], times)
            yield base | {"ratio": f"{REFERENCE} / {variant}"} | numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="data file, appended to")
    parser.add_argument("--variants", default="qalora-4,lora,qlora,qalora-3,qalora-2")
    parser.add_argument("--model", choices=MODELS, default="1.1B")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--checkpointing", action="store_true")
    a = parser.parse_args()
    data = record.DataFile(a.output, measure.origin(a.device))
    with tempfile.TemporaryDirectory() as scratch:
        parameters = make_model(MODELS[a.model], a.sequence, a.device, Path(scratch))
        spec = {
            "name": a.model,
            "parameters": parameters,
            "model": scratch,
            "tokenizer": str(TOKENIZER),
            "device": a.device,
            "threads": torch.get_num_threads(),
            "vocab": MODELS[a.model]["vocab"],
            "batch": a.batch,
            "sequence": a.sequence,
            "steps": a.steps,
            "dataset_rows": a.batch * a.steps * (a.rounds + WARM_UP),
            "r": a.rank,
            "group_size": a.group_size,
            "checkpointing": a.checkpointing,
        }
        for row in run(spec, a.variants.split(","), a.rounds):
            data.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
