"""What a rank holds of a quantized base under ZeRO-3: memory.py OUT_JSON [LAYERS] [RANKS...]

A random Llama of LAYERS blocks (24: 308M quantized parameters) at INT-4, group size 32, is loaded
and trained for a step on 1, 2 and 4 CPU ranks. Of each rank: the bytes of the tensors it keeps for
the quantized layers, and its resident memory (anonymous pages: files that are mapped do not count)
before the model is loaded, after, after a step, and at its highest while loading.
"""

import gc
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from functools import partial
from pathlib import Path
from typing import Any

import torch
from drive import Runs
from safetensors.torch import save_file
from train import Job, make_trainer, use_cpu_ranks
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qalora_plugin import QALoRAQuantConfig
from qalora_plugin.architecture.selection import linears_to_quantize
from qalora_plugin.checkpoint.layout import guard_tensor
from qalora_plugin.layers.linear import QuantLinear

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "qalora_plugin" / "quickstart" / "base_model"


def make_base(out: Path, layers: int) -> None:
    """Write a quantized checkpoint of random numbers."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    grid = QALoRAQuantConfig(bits=4, group_size=32)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    tensors: dict[str, torch.Tensor] = {}
    chosen = linears_to_quantize(model, grid)
    for name, linear in chosen.items():
        spec = grid.spec_for(name, linear.in_features, linear.out_features)
        words = (spec.packed_rows, spec.out_features)
        shape = (spec.num_groups, spec.out_features)
        low, high = -(2**31), 2**31
        qweight = torch.randint(low, high, words, generator=generator, dtype=torch.int64)
        tensors[f"{name}.qweight"] = qweight.to(torch.int32)
        tensors[f"{name}.scales"] = (torch.rand(shape, generator=generator) * 0.005 + 0.001).half()
        tensors[f"{name}.offsets"] = (torch.randn(shape, generator=generator) * 0.001).half()
        tensors[f"{name}.weight"] = guard_tensor(spec.in_features)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in chosen:
            values = torch.ones(parameter.shape)
            if parameter.dim() == 2:
                values = torch.randn(parameter.shape, generator=generator) * 0.02
            tensors[name] = values.bfloat16()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = grid.to_dict() | {"base": {"fingerprint": "0" * 32}}
    config.save_pretrained(out)
    tokenizer.save_pretrained(out)


def anonymous() -> int:
    """Return the bytes of this process's resident memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no RssAnon in /proc/self/status")


def settled() -> int:
    """Return the same, after memory that was freed has gone back to the system."""
    gc.collect()
    CDLL("libc.so.6").malloc_trim(0)
    return anonymous()


@contextmanager
def highest() -> Iterator[list[int]]:
    """Measure the highest value of `anonymous` for a while, every 5 ms."""
    found, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            found[0] = max(found[0], anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def held(model: torch.nn.Module) -> dict[str, int]:
    """Return the bytes of the quantized layers on this rank: sharded, and whole on every rank."""
    found = {"sharded": 0, "whole": 0}
    for layer in model.modules():
        if not isinstance(layer, QuantLinear):
            continue
        for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
            part = getattr(tensor, "ds_tensor", None)
            mine = tensor if part is None else part
            found["whole" if part is None else "sharded"] += mine.numel() * mine.element_size()
    return found


def measure(base: Path, out: Path, ranks: int) -> None:
    """Load, adapt and train a step in one rank, and write the numbers to a file."""
    use_cpu_ranks("zero3")
    before = settled()
    settings: dict[str, Any] = {"max_length": 16, "per_device_train_batch_size": 1}
    job = Job(base=str(base), out=str(out), mode="zero3", steps=1, settings=settings)
    with highest() as peak:
        trainer = make_trainer(job)
    loaded = settled()
    tensors = held(trainer.model)
    trainer.train()
    rows = {"before": before, "loaded": loaded, "trained": settled(), "peak_loading": peak[0]}
    path = out.with_name(f"{out.name}-rank{os.environ.get('RANK', '0')}.json")
    path.write_text(json.dumps(rows | tensors | {"ranks": ranks}))


def main() -> None:
    out, numbers = Path(sys.argv[1]), [int(argument) for argument in sys.argv[2:]]
    layers, counts = (numbers or [24])[0], numbers[1:] or [1, 2, 4]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = work / "base"
        make_base(base, layers)
        runs = Runs(base, base, work)
        found: dict[str, Any] = {"layers": layers, "bits": 4, "group_size": 32, "ranks": {}}
        for count in counts:
            run = work / f"ranks{count}"
            start = time.monotonic()
            work_in = partial(measure, base, run, count)
            ended = runs.launch(run.name, count, work_in, grouped=True)
            if ended["codes"] != [0] * count:
                raise SystemExit("\n".join(ended["logs"])[-5000:])
            parts = [json.loads(path.read_text()) for path in sorted(work.glob(f"{run.name}-*"))]
            found["ranks"][str(count)] = parts
            print(f"{count} ranks: {time.monotonic() - start:.0f} s", parts[0], file=sys.stderr)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
