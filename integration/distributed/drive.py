"""Trainings on CPU ranks, one after the other: drive.py BASE_16BIT WORK_DIR [STEP...] -> JSON"""

import json
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from ranks import launch
from safetensors.torch import load_file
from support.mixtures import mixture
from train import SHARDED, Job, run

from qalora_plugin import quantize_model, verify_merge

STEPS = 20
MODES = [("one", 1, "ddp"), *((mode, 2, mode) for mode in SHARDED)]
"""Name, ranks and mode of each run of `straight`."""


class Runs:
    """Trains, and compares what became of it."""

    def __init__(self, dense, base, work):
        self.dense, self.base, self.work = dense, base, work

    def train(self, name, ranks, mode, *, must_end=True, **job):
        """Train; return what result.json says, or how the ranks ended unless they `must_end`."""
        out = self.work / name
        settings = {"base": str(self.base), "out": str(out), "mode": mode, "steps": STEPS} | job
        ended = launch(self.work / f"{name}.log", ranks, lambda: run(Job(**settings)))
        if must_end:
            if ended["codes"] != [0] * ranks:
                raise SystemExit(f"{name}: {ended['codes']}\n" + "\n".join(ended["logs"])[-6000:])
            return json.loads((out / "result.json").read_text())
        ended["logs"] = [text[-20000:] for text in ended["logs"]]
        return ended

    def adapter(self, name):
        return load_file(self.work / name / "adapter" / "adapter_model.safetensors")

    def difference(self, one, other):
        """Return the relative difference of two whole adapters, in Frobenius norm."""
        a, b = self.adapter(one), self.adapter(other)
        if a.keys() != b.keys():
            raise SystemExit(f"{one} and {other} trained different tensors")
        square = sum((a[key] - b[key]).double().square().sum() for key in a)
        return (square / sum(a[key].double().square().sum() for key in a)).sqrt().item()

    def verified(self, name):
        """Verify a merge; return the number of layers."""
        out = self.work / name
        return verify_merge(out / "merged", out / "adapter", self.base).layers


def tensors(value, path=""):
    """Return every tensor in nested lists and dicts, by its path."""
    if isinstance(value, torch.Tensor):
        return {path: value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    found = {}
    for key, part in value.items() if isinstance(value, dict) else ():
        found |= tensors(part, f"{path}/{key}")
    return found


def optimizer_states(checkpoint):
    """Return every tensor of the optimizer that a Trainer saved, whole or in parts."""
    files = [*checkpoint.glob("optimizer.pt"), *checkpoint.glob("global_step*/*optim_states.pt")]
    if not files:
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        whole = checkpoint / "optimizer_whole.pt"
        dcp_to_torch_save(checkpoint / "optimizer_0", whole)
        files = [whole]
    found = {}
    for file in files:
        found |= tensors(torch.load(file, weights_only=False), file.name)
    return found


def largest(one, other):
    """Return the largest difference of two sets of tensors, relative to each one's maximum."""
    if one.keys() != other.keys() or not one:
        raise SystemExit(f"different states: {sorted(one.keys() ^ other.keys())[:4]}")
    pairs = [(one[key].double(), other[key].double()) for key in one if one[key].numel()]
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def straight(runs):
    """Train on the same data on one rank, and in every mode on two."""
    found: dict[str, Any] = {}
    for name, ranks, mode in MODES:
        merged = str(runs.work / name / "merged")
        result = runs.train(name, ranks, mode, merged=merged, save_steps=10)
        result |= {"difference": runs.difference("one", name), "layers": runs.verified(name)}
        found[name] = result
    return found


def same_bytes(runs):
    """Compare the merge after sharded training with that of one rank with the same adapter.

    That rank trains a step with a learning rate of 0.
    """
    found = {}
    for mode in ("zero3", "fsdp2"):
        name = f"{mode}-one"
        adapter = runs.work / mode / "adapter"
        merged = str(runs.work / name / "merged")
        job = {"warm_start": str(adapter), "steps": 1, "settings": {"learning_rate": 0.0}}
        runs.train(name, 1, "ddp", merged=merged, **job)
        files, others = (
            {path.name: path.read_bytes() for path in (runs.work / which / "merged").iterdir()}
            for which in (mode, name)
        )
        different = [file for file in files if files[file] != others.get(file)]
        found[mode] = {"names": sorted(files), "again": sorted(others), "different": different}
    return found


def resumed(runs):
    """Kill after step 13, resume from the checkpoint of step 10, and compare with `straight`."""
    found = {}
    for name, ranks, mode in MODES:
        again = f"{name}-resumed"
        merged = str(runs.work / again / "merged")
        job = {"merged": merged, "save_steps": 10}
        ended = runs.train(again, ranks, mode, must_end=False, kill=[ranks - 1, 13], **job)
        ended["left"] = sorted(path.name for path in (runs.work / again).iterdir())
        checkpoint = runs.work / again / "checkpoint-10"
        result = runs.train(again, ranks, mode, resume=str(checkpoint), **job)
        before = json.loads((runs.work / name / "result.json").read_text())
        last = "checkpoint-20"
        found[name] = {
            "killed": ended,
            "losses": [before["losses"], result["losses"]],
            "adapter": largest(runs.adapter(name), runs.adapter(again)),
            "optimizer": largest(
                optimizer_states(runs.work / name / last),
                optimizer_states(runs.work / again / last),
            ),
            "layers": runs.verified(again),
        }
    return found


def other_ranks(runs):
    """Resume checkpoints of two ranks on four, where that is possible; and try a warm start."""
    found = {}
    for mode in ("zero2", "zero3", "fsdp2"):
        job = {"resume": str(runs.work / mode / "checkpoint-10"), "steps": 12}
        ended = runs.train(f"{mode}-on-four", 4, mode, must_end=False, **job)
        found[mode] = {"resumed": ended["codes"] == [0] * 4, "log": ended["logs"][0][-900:]}
    checkpoint = str(runs.work / "zero3" / "checkpoint-10")
    result = runs.train("warm", 1, "ddp", warm_start=checkpoint, steps=2)
    cold = json.loads((runs.work / "one" / "result.json").read_text())["losses"]
    return found | {"warm": result["losses"], "cold": cold[:2]}


def references(runs):
    """Train beside a frozen copy of the adapter to start from, and the same resumed halfway."""
    found = {}
    for mode in ("zero3", "fsdp2"):
        start = str(runs.work / mode / "checkpoint-10")
        job = {"warm_start": start, "reference": True, "steps": 4, "save_steps": 2}
        for name, more in (
            ("whole", {}),
            ("again", {"resume": f"{runs.work}/{mode}-whole/checkpoint-2"}),
        ):
            merged = str(runs.work / f"{mode}-{name}" / "merged")
            runs.train(f"{mode}-{name}", 2, mode, merged=merged, **job, **more)
        files = (runs.work / f"{mode}-whole" / f"checkpoint-{n}" for n in (2, 4))
        at_2, at_4 = (load_file(file / "adapter_model.safetensors") for file in files)
        found[mode] = {
            "difference": runs.difference(f"{mode}-whole", f"{mode}-again"),
            "second_half": largest(at_2, at_4),
            "layers": runs.verified(f"{mode}-again"),
        }
    return found


def killed_merge(runs):
    """Kill rank 0 when all of the merge is written but has not its name yet; then run again."""
    out = runs.work / "killed-merge"
    job = {"merged": str(out / "merged"), "save_steps": 10, "steps": 10}
    found = runs.train(out.name, 2, "zero3", must_end=False, kill_merge=True, **job)
    found["left"] = sorted(path.name for path in out.iterdir())
    runs.train(out.name, 2, "zero3", resume=str(out / "checkpoint-10"), **job)
    return found | {
        "layers": runs.verified(out.name),
        "after": sorted(p.name for p in out.iterdir()),
    }


def other_bases(runs):
    """Train on a base that is quantized while it loads, and on stock GPTQ with act-order."""
    found: dict[str, Any] = {}
    for base, path, bits in (("dense", runs.dense, 4), ("stock", STOCK, 0)):
        for mode, ranks in (("ddp", 1), ("zero3", 2), ("fsdp2", 2)):
            name = f"{base}-{mode}"
            out = runs.work / name
            job = {"base": str(path), "quantize": bits, "merged": str(out / "merged"), "steps": 2}
            found[name] = runs.train(name, ranks, mode, adapt="both", **job)
            config = json.loads((out / "adapter" / "adapter_config.json").read_text())
            found[name]["fingerprint"] = config["fingerprint"]
            found[name]["left"] = sorted(part.name for part in out.iterdir())
    return found


def mixtures(runs):
    """Train a mixture whose ranks send tokens to different experts, and some to none."""
    dense = runs.work / "mixture"
    mixture("qwen3_moe", inner=64, vocab_size=2048).save_pretrained(dense)
    for file in runs.dense.glob("*token*"):
        shutil.copy(file, dense)
    base = runs.work / "mixture-int4"
    quantize_model(dense, base, bits=4, group_size=16, method="rtn", progress=False)
    own, found = Runs(dense, base, runs.work), {}
    names = [("one", 1, "ddp"), ("ddp", 2, "ddp"), ("zero3", 2, "zero3"), ("fsdp2", 2, "fsdp2")]
    # TRL adds a loss that balances experts: no mean over tokens, so that ranks differ from one
    job = {"steps": 2, "adapt": "both", "settings": {"router_aux_loss_coef": 0.0}}
    for name, ranks, mode in names:
        merged = str(runs.work / f"mixture-{name}" / "merged")
        result = own.train(f"mixture-{name}", ranks, mode, merged=merged, **job)
        found[name] = result | {
            "difference": own.difference("mixture-one", f"mixture-{name}"),
            "layers": own.verified(f"mixture-{name}"),
        }
    return found


STOCK = Path(__file__).resolve().parents[2] / "tests/fixtures/gptq_4bit_g128_actorder_asym"
ALL = (
    straight,
    same_bytes,
    resumed,
    other_ranks,
    references,
    killed_merge,
    other_bases,
    mixtures,
)


def main():
    """Run all steps, or those that are named; `straight` comes first, others compare with it."""
    dense, work = (Path(argument).absolute() for argument in sys.argv[1:3])
    runs = Runs(dense, work / "base", work)
    if not runs.base.exists():
        quantize_model(dense, runs.base, bits=4, group_size=32, method="rtn", progress=False)
    found = {}
    for step in ALL:
        if not sys.argv[3:] or step.__name__ in sys.argv[3:]:
            start = time.monotonic()
            try:
                found[step.__name__] = step(runs)
            except (Exception, SystemExit):  # the test shows what failed; the others go on
                found[step.__name__] = {"error": traceback.format_exc()}
            print(f"{step.__name__}: {time.monotonic() - start:.0f} s", file=sys.stderr)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
