"""Run a stock GPTQ directory in GPTQModel or AutoGPTQ, whichever is installed.

This package is not needed.

PYTHON run.py MODEL_DIR INPUT.safetensors OUT.safetensors -> one line of JSON: the engine

INPUT holds `input_ids` int64 [B, T]; OUT gets `logits` fp32 [B, T, vocab]. Weights are dequantized
and multiplied in float32, so that the result can be compared closely.
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling takes minutes here, running milliseconds

import torch
from safetensors.torch import load_file, save_file


def load_gptqmodel(directory: str) -> Any:
    """Load it in GPTQModel with its torch kernel: its other CPU kernel ignores zero-points."""
    from gptqmodel import BACKEND, GPTQModel

    # left to itself it rounds the scales to bfloat16 on a CPU
    return GPTQModel.load(directory, backend=BACKEND.TORCH, device="cpu", dtype=torch.float16)


def load_autogptq(directory: str) -> Any:
    """Load it in AutoGPTQ with every CUDA kernel switched off."""
    from auto_gptq import AutoGPTQForCausalLM

    return AutoGPTQForCausalLM.from_quantized(
        directory,
        device="cpu",
        use_safetensors=True,
        use_triton=False,
        disable_exllama=True,
        disable_exllamav2=True,
        inject_fused_attention=False,
        inject_fused_mlp=False,
        torch_dtype=torch.float16,
    )


def main() -> None:
    """Run the model on the input, and write what it computes."""
    directory, given, out = (Path(argument).resolve() for argument in sys.argv[1:4])
    load = load_gptqmodel if importlib.util.find_spec("gptqmodel") else load_autogptq
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        os.chdir(scratch)  # GPTQModel writes its logs into the working directory
        model = load(str(directory)).model.float().eval()
        logits = model(input_ids=load_file(given)["input_ids"]).logits
    save_file({"logits": logits.float().contiguous()}, out)
    print(json.dumps({"engine": load.__name__.removeprefix("load_")}))


if __name__ == "__main__":
    main()
