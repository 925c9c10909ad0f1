"""Kill the ONNX export: onnx_kills.py MERGED FOLDER TIMES, in the environment that has ONNX."""

import json
import random
import sys
from pathlib import Path

import onnx_ir  # noqa: F401, once for all children
import onnxruntime_genai.models.builder  # noqa: F401
import torch

sys.path.insert(0, str(Path(__file__).parent))

from processes import kill_often

from qalora_plugin.formats.export import export_model


def main(merged, folder, times):
    """Print the counts, as JSON."""
    torch.set_num_threads(1)  # forked processes have no other threads
    target = Path(folder) / "x-onnx"

    def act():
        return export_model(merged, target, "onnx")

    print(json.dumps(kill_often(act, target, int(times), random.Random(0))))


if __name__ == "__main__":
    main(*sys.argv[1:])
