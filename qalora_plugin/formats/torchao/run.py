"""Run a directory with stock transformers, and a LoRA adapter with stock PEFT on it.

This package is not needed, and not imported.

PYTHON run.py MODEL_DIR INPUT.safetensors OUT.safetensors [ADAPTER_DIR]

INPUT holds `input_ids` int64 [B, T]; OUT gets `logits` fp32 [B, T, vocab]. Prints one line of JSON:
the types of the linear layers' weights and the largest change of a logit by the adapter.
"""

import json
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    """Run the model on the input, and write what it computes."""
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    kinds = sorted({type(linear.weight).__name__ for linear in linears})
    ids, change = load_file(sys.argv[2])["input_ids"], 0.0
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        if sys.argv[4:]:
            from peft import PeftModel

            plain, model = logits, PeftModel.from_pretrained(model, sys.argv[4])
            logits = model(input_ids=ids).logits
            change = (logits - plain).abs().max().item()
    assert "qalora_plugin" not in sys.modules, "these are not stock transformers and PEFT"
    save_file({"logits": logits.float().contiguous()}, sys.argv[3])
    print(json.dumps({"weights": kinds, "change": change}))


if __name__ == "__main__":
    main()
