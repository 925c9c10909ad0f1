"""`axolotl train` on CPU ranks: torchrun --nproc_per_node 2 two_ranks.py RECIPE OVERRIDES_JSON

Axolotl places each rank on the GPU of its number; without GPUs its device map is taken away.
"""

import json
import os
import sys

os.environ["ACCELERATE_USE_CPU"] = "1"  # ranks talk through gloo

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train

if __name__ == "__main__":
    cfg = load_cfg(sys.argv[1], **json.loads(sys.argv[2]))
    cfg.device_map = None
    do_train(cfg, TrainerCliArgs())
