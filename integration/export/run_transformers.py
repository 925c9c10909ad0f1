"""Run a directory with stock transformers, and a LoRA adapter with stock PEFT on it.

PYTHON run_transformers.py MODEL_DIR INPUT.safetensors OUT.safetensors [ADAPTER_DIR]

INPUT holds `input_ids` int64 [B, T]; OUT gets `logits` fp32 [B, T, vocab]. Prints one line of JSON:
the type of the first layer's weight and the largest change by the adapter. In an environment
without this project.
"""

import importlib.util
import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    assert importlib.util.find_spec("qalora_plugin") is None, "this environment holds the plugin"
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    kind = type(model.model.layers[0].self_attn.q_proj.weight).__name__
    ids, change = load_file(sys.argv[2])["input_ids"], 0.0
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        if sys.argv[4:]:
            from peft import PeftModel

            plain, model = logits, PeftModel.from_pretrained(model, sys.argv[4])
            logits = model(input_ids=ids).logits
            change = (logits - plain).abs().max().item()
    save_file({"logits": logits.float().contiguous()}, sys.argv[3])
    print(json.dumps({"weight": kind, "change": change}))


if __name__ == "__main__":
    main()
