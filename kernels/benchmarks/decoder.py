"""One decoder layer of a Llama, forward and backward, beside LoRA, QLoRA and the bare products.

    python decoder.py --device cuda --output decoder.jsonl --rows 4096

Two things are timed, each with every variant in turn in one process:

    "decoder layer"        the whole layer: projections, attention, norms
    "linears of the layer" its seven projections alone

Variants: those of `step_worker` ("frozen" is the layer with dense weights and no adapter) and, for
the linears, "gemms": the 14 bf16 matrix products, on the same shapes, and nothing else. Gradients
reach the layer's input, as in every layer of a deep model. "timing" is "eager" (what a trainer
runs) or "graph" (one CUDA graph of the whole step: without Python's share).
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import record
import step_worker
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

VARIANTS = ["qalora", "frozen", "lora", "lora_fp32", "qlora_nf4"]
Step = Callable[[], None]


class Variant:
    """A decoder layer in one of the forms of `step_worker`, with the input that it is timed on."""

    def __init__(self, name: str, spec: dict[str, Any], hidden: torch.Tensor):
        model = step_worker.build(spec | {"variant": name})
        self.layer = next(m for m in model.modules() if isinstance(m, LlamaDecoderLayer))
        rotary = next(m for m in model.modules() if isinstance(m, LlamaRotaryEmbedding))
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        self.positions = rotary(hidden, positions)
        self.hidden = hidden

    def _clear(self) -> None:
        for parameter in self.layer.parameters():
            parameter.grad = None

    def whole(self) -> None:
        """Forward and backward of the layer."""
        self._clear()
        x = self.hidden.detach().requires_grad_()
        y = self.layer(x, position_embeddings=self.positions)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(self.hidden)

    def linears(self) -> Step:
        """Forward and backward of the seven projections on inputs of their own."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        modules = [getattr(attention, f"{name}_proj") for name in "qkvo"]
        modules += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        inputs = {m.in_features: random_rows(self.hidden, m.in_features) for m in modules}
        outputs = {m.out_features: random_rows(self.hidden, m.out_features) for m in modules}

        def step() -> None:
            self._clear()
            for module in modules:
                x = inputs[module.in_features].detach().requires_grad_()
                module(x).backward(outputs[module.out_features])

        return step


def random_rows(like: torch.Tensor, width: int) -> torch.Tensor:
    """Random numbers [..., width]."""
    return torch.randn(*like.shape[:-1], width, device=like.device, dtype=like.dtype)


def gemms(spec: dict[str, Any], hidden: torch.Tensor) -> Step:
    """The matrix products of the seven projections: y = x W^T and dx = dy W."""
    h, i, m = spec["hidden"], spec["intermediate"], hidden.shape[0] * hidden.shape[1]
    products = []
    for n, k in [(h, h)] * 4 + [(i, h)] * 2 + [(h, i)]:
        shapes = ((m, k), (n, k), (m, n))
        kind = {"device": hidden.device, "dtype": hidden.dtype}
        products.append(tuple(torch.randn(*shape, **kind) for shape in shapes))

    def step() -> None:
        for x, weight, dy in products:
            torch.mm(x, weight.t())
            torch.mm(dy, weight)

    return step


def build(
    spec: dict[str, Any], variants: list[str], hidden: torch.Tensor
) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants, and why the others cannot run."""
    built, missing = {}, {}
    for name in variants:
        try:
            variant = Variant(name, spec, hidden)
            variant.whole()
            built[name] = variant
        except Exception as error:
            if name in ("qalora", "frozen"):
                raise
            missing[name] = measure.first_line(error)
    return built, missing


def peak_bytes(step: Step, device: str) -> dict[str, int]:
    """Peak memory of a step above what is held before it (GPU only)."""
    if device != "cuda":
        return {}
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return {"step_peak_bytes": torch.cuda.max_memory_allocated() - held}


def compare(
    operator: str, timing: str, steps: dict[str, Step], base: record.Row, rounds: int, device: str
) -> Iterator[record.Row]:
    """Time steps in turn: a row a variant, a ratio "qalora / variant" each."""
    if timing == "graph":
        graphs = {}
        for name, step in steps.items():
            try:
                graphs[name] = measure.graphed(step, 1, device)
            except Exception as error:
                reason = measure.first_line(error)
                yield (
                    base
                    | {"operator": operator, "timing": timing}
                    | {
                        "variant": name,
                        "not_run": reason,
                    }
                )
        peaks: dict[str, dict[str, int]] = {name: {} for name in graphs}
        steps = graphs
    else:
        peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    base = base | {"operator": operator, "timing": timing, "rounds": rounds}
    samples = measure.interleave(steps, rounds, device)
    for name, times in samples.items():
        yield base | {"variant": name} | peaks[name] | measure.spread(times, "seconds")
    for name in samples:
        if name != "qalora" and "qalora" in samples:
            numbers = measure.ratio(samples["qalora"], samples[name])
            yield base | {"ratio": f"qalora / {name}"} | numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--output", type=Path, required=True, help="data file, appended to")
    parser.add_argument("--rows", type=int, required=True, help="M, tokens of a step")
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--rounds", type=int, default=25)
    a = parser.parse_args()
    data, _ = record.open_data_file(a.output, a.device)
    spec = {
        "device": a.device,
        "hidden": a.hidden,
        "intermediate": a.intermediate,
        "layers": 1,
        "heads": a.heads,
        "vocab": 128,
        "sequence": a.sequence,
        "bits": a.bits,
        "group_size": a.group_size,
        "r": a.rank,
    }
    batch = a.rows // a.sequence
    hidden = torch.randn(batch, a.sequence, a.hidden, device=a.device, dtype=torch.bfloat16)
    base = {"M": batch * a.sequence, "bits": a.bits, "group_size": a.group_size, "r": a.rank}
    base |= {"hidden": a.hidden, "intermediate": a.intermediate, "sequence": a.sequence}
    variants, missing = build(spec, a.variants.split(","), hidden)
    for name, reason in missing.items():
        for operator in ("decoder layer", "linears of the layer"):
            data.add(base | {"operator": operator, "variant": name, "not_run": reason})
    layers = {name: variant.whole for name, variant in variants.items()}
    linears = {name: variant.linears() for name, variant in variants.items()}
    linears["gemms"] = gemms(spec, hidden)
    for timing in ("eager", "graph"):
        for operator, steps in (("decoder layer", layers), ("linears of the layer", linears)):
            for row in compare(operator, timing, steps, base, a.rounds, a.device):
                data.add(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
