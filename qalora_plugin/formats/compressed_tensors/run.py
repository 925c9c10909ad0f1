"""Run a directory with stock transformers and compressed-tensors, in fp32.

This package is not needed, and not imported.

PYTHON run.py MODEL_DIR INPUT.safetensors OUT.safetensors -> one line of JSON: the library's version

INPUT holds `input_ids` int64 [B, T]; OUT gets `logits` fp32 [B, T, vocab].
"""

import json
import sys

import compressed_tensors
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Run the model on the input, and write what it computes."""
    model = AutoModelForCausalLM.from_pretrained(
        sys.argv[1], dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
        logits = model(input_ids=load_file(sys.argv[2])["input_ids"]).logits
    assert "qalora_plugin" not in sys.modules, "this is not stock transformers"
    save_file({"logits": logits.float().contiguous()}, sys.argv[3])
    print(json.dumps({"compressed_tensors": compressed_tensors.__version__}))


if __name__ == "__main__":
    main()
