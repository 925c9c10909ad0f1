"""`axolotl train` on two CPU ranks, run after run: two_ranks.py RECIPE OVERRIDES_JSON

The overrides are one object a run, and its log is beside its output_dir. Accelerate can have
several ranks on a CPU, or DeepSpeed or FSDP, but not both; and Axolotl places each rank, and
FSDP2's mesh, on GPUs. Both are told otherwise here. The rest is theirs.
"""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed  # noqa: F401  (before the ranks are forked)
from accelerate import ParallelismConfig
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))
from ranks import launch
from train import use_cpu_ranks


def train(recipe, settings):
    """Train in this rank."""
    use_cpu_ranks("fsdp2" if "fsdp_config" in settings else "zero3")
    on = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, _: on(self, "cpu")
    cfg = load_cfg(recipe, **settings)
    cfg.device_map = None
    do_train(cfg, TrainerCliArgs())


if __name__ == "__main__":
    recipe, runs = sys.argv[1], json.loads(sys.argv[2])
    sys.argv = sys.argv[:1]
    for settings in runs:
        out = Path(settings["output_dir"])
        out.parent.mkdir(exist_ok=True)
        ended = launch(
            out.with_suffix(".log"), 2, lambda settings=settings: train(recipe, settings)
        )
        if ended["codes"] != [0, 0]:
            raise SystemExit(f"{out}: {ended['codes']}\n" + "\n".join(ended["logs"])[-6000:])
