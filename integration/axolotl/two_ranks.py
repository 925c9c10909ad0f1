"""`axolotl train` on CPU ranks: torchrun --nproc_per_node 2 two_ranks.py RECIPE OVERRIDES_JSON

Accelerate can have several ranks on a CPU, or DeepSpeed, but not both; and Axolotl places each rank
on the GPU of its number. Both are told otherwise here. The rest is theirs.
"""

import json
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

from accelerate import PartialState
from accelerate.utils import DistributedType
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.cli.train import do_train

if __name__ == "__main__":
    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_CPU)
    cfg = load_cfg(sys.argv[1], **json.loads(sys.argv[2]))
    cfg.device_map = None
    do_train(cfg, TrainerCliArgs())
