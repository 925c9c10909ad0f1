"""Run an MLX directory with mlx-lm; this package is not needed.

PYTHON run.py MODEL_DIR INPUT.safetensors OUT.safetensors [PROMPT] -> one line of JSON

INPUT holds `input_ids` int64 [B, T]; OUT gets `logits` fp32 [B, T, vocab]. The line holds the text
after the prompt.
"""

import json
import sys

import mlx.core as mx
import numpy as np
from mlx_lm import generate, load
from safetensors.numpy import load_file, save_file


def main() -> None:
    """Run the model on the input, and write what it computes."""
    model, tokenizer = load(sys.argv[1])
    model.set_dtype(mx.float32)  # a model that MLX made computes in 16 bits
    logits = model(mx.array(load_file(sys.argv[2])["input_ids"])).astype(mx.float32)
    save_file({"logits": np.array(logits)}, sys.argv[3])
    text = generate(model, tokenizer, prompt=sys.argv[4], max_tokens=16) if sys.argv[4:] else None
    print(json.dumps({"text": text}))


if __name__ == "__main__":
    main()
