"""What a rank holds of a quantized base under ZeRO-3: memory.py OUT_JSON [LAYERS] [RANKS...]

A random Llama of LAYERS blocks (24: 308M quantized parameters) at INT-4, group size 32, is loaded
and trained for a step on 1, 2 and 4 CPU ranks. Of each rank: the bytes of the tensors it keeps for
the quantized layers, and its resident memory (anonymous pages: files that are mapped do not count)
before the model is loaded, after, after a step, and at its highest while loading. Needs the
repository's `tests` on the PYTHONPATH.
"""

import gc
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from ctypes import CDLL
from functools import partial
from pathlib import Path
from typing import Any

from ranks import launch
from support.random_model import random_checkpoint
from train import ROOT, Job, make_trainer, use_cpu_ranks
from transformers import AutoTokenizer, LlamaConfig

from qalora_plugin.layers.linear import QuantLinear

TOKENIZER = ROOT / "qalora_plugin" / "quickstart" / "base_model"


def make_base(out, layers):
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
    tokenizer.save_pretrained(random_checkpoint(config, out))


def anonymous():
    """Return the bytes of this process's resident memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no RssAnon in /proc/self/status")


def settled():
    """Return the same, after memory that was freed has gone back to the system."""
    gc.collect()
    CDLL("libc.so.6").malloc_trim(0)
    return anonymous()


@contextmanager
def highest():
    """Measure the highest value of `anonymous` for a while, every 5 ms."""
    found, done = [0], threading.Event()

    def look():
        while not done.wait(0.005):
            found[0] = max(found[0], anonymous())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


def held(model):
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


def measure(base, out, ranks):
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


def main():
    out, numbers = Path(sys.argv[1]), [int(argument) for argument in sys.argv[2:]]
    layers, counts = (numbers or [24])[0], numbers[1:] or [1, 2, 4]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        base = work / "base"
        make_base(base, layers)
        found: dict[str, Any] = {"layers": layers, "bits": 4, "group_size": 32, "ranks": {}}
        for count in counts:
            run = work / f"ranks{count}"
            start = time.monotonic()
            work_in = partial(measure, base, run, count)
            ended = launch(f"{run}.log", count, work_in, grouped=True)
            if ended["codes"] != [0] * count:
                raise SystemExit("\n".join(ended["logs"])[-5000:])
            parts = [json.loads(path.read_text()) for path in sorted(work.glob(f"{run.name}-*"))]
            found["ranks"][str(count)] = parts
            print(f"{count} ranks: {time.monotonic() - start:.0f} s", parts[0], file=sys.stderr)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
