"""Run a stock GPTQ directory with the engine that invented or maintains the format.

PYTHON run.py MODEL_DIR INPUT.safetensors OUT.safetensors [--engine gptqmodel|autogptq]

This package is not needed; the engine is by default the one that is installed. INPUT holds
`input_ids` int64 [B, T]; OUT gets `logits` fp32 [B, T, vocab]. Weights are dequantized and
multiplied in float32, so that the result can be compared closely. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from pathlib import Path

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes here, running milliseconds

import torch
from safetensors.torch import load_file, save_file


def load_gptqmodel(directory: Path) -> torch.nn.Module:
    """GPTQModel with its torch kernel: its other CPU kernel ignores zero-points."""
    from gptqmodel import BACKEND, GPTQModel

    # Left to itself it rounds the scales to bfloat16 on a CPU.
    return GPTQModel.load(
        str(directory), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16
    ).model


def load_autogptq(directory: Path) -> torch.nn.Module:
    """AutoGPTQ with every CUDA kernel switched off."""
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        str(directory),
        device="cpu",
        use_safetensors=True,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        torch_dtype=torch.float16,
    ).model


ENGINES = {"gptqmodel": ("gptqmodel", load_gptqmodel), "autogptq": ("auto-gptq", load_autogptq)}


def installed() -> str:
    """The engine of this environment."""
    return "gptqmodel" if importlib.util.find_spec("gptqmodel") else "autogptq"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engine", choices=ENGINES, default=installed())
    arguments = parser.parse_args()

    distribution, load = ENGINES[arguments.engine]
    input_ids = load_file(arguments.input)["input_ids"]
    directory, out = arguments.model_dir.resolve(), arguments.out.resolve()
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        os.chdir(scratch)  # GPTQModel writes its logs into the working directory
        logits = load(directory).float().eval()(input_ids=input_ids).logits
    save_file({"logits": logits.float().contiguous()}, out)
    version = importlib.metadata.version(distribution)
    print(json.dumps({"engine": arguments.engine, "version": version, "shape": list(logits.shape)}))


if __name__ == "__main__":
    main()
