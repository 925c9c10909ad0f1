"""Dequantize a checkpoint with the library that owns its format; run in the environment `bases`.

    PYTHON dequantize.py NAME DIRECTORY OUT.safetensors

NAME is the fixture that DIRECTORY was made from. OUT gets `<layer>.weight` fp32 [N, K] of every
quantized layer, and `logits` fp32 [1, T, vocab] of the token ids 0, 1, ... where transformers loads
the directory with that library: AutoAWQ's models need an older transformers, and AutoRound has no
kernel for the CPU for 8 bits and for AutoAWQ's packing.
"""

import sys
from pathlib import Path

import torch
from make_fixtures import FIXTURES, MAKERS
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

LOADED = ("ct_", "autoround_3bit", "autoround_4bit")


def main(name, directory, out):
    fixture = FIXTURES[name]
    library = fixture.format.partition(":")[0]
    found = {k: v.float() for k, v in MAKERS[library][1](fixture, Path(directory)).items()}
    if name.startswith(LOADED):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            found["logits"] = model(input_ids=torch.arange(24)[None]).logits.float()
    save_file({key: value.contiguous() for key, value in found.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
