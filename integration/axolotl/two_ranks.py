"""`axolotl train` on CPU ranks: torchrun --nproc_per_node 2 two_ranks.py RECIPE OVERRIDES_JSON

Accelerate can have several ranks on a CPU, or DeepSpeed or FSDP, but not both; and Axolotl places
each rank, and FSDP2's mesh, on GPUs. Both are told otherwise here. The rest is theirs.
"""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

from accelerate import ParallelismConfig
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))
from train import use_cpu_ranks

if __name__ == "__main__":
    settings = json.loads(sys.argv[2])
    use_cpu_ranks("fsdp2" if "fsdp_config" in settings else "zero3")
    on = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, _: on(self, "cpu")
    cfg = load_cfg(sys.argv[1], **settings)
    cfg.device_map = None
    do_train(cfg, TrainerCliArgs())
