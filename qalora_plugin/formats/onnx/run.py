"""Run an ONNX directory with ONNX Runtime; this package is not needed.

PYTHON run.py MODEL_DIR INPUT.safetensors OUT.safetensors

INPUT holds `input_ids` int64 [B, T]; OUT gets `logits` fp32 [B, T, vocab], and where
onnxruntime-genai is installed `generated` int64 [new tokens]: what it generates greedily after the
first row, through its KV cache.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load_file, save_file

NEW_TOKENS = 16


def main() -> None:
    """Run the model on the input, and write what it computes."""
    directory, ids = sys.argv[1], load_file(sys.argv[2])["input_ids"]
    session = onnxruntime.InferenceSession(str(Path(directory) / "model.onnx"))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    settings = json.loads((Path(directory) / "genai_config.json").read_text())["model"]["decoder"]
    empty = (ids.shape[0], settings["num_key_value_heads"], 0, settings["head_size"])
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            inputs[entry.name] = np.zeros(empty, dtype=np.float32)
    (logits,) = session.run(["logits"], inputs)
    out = {"logits": logits}
    if importlib.util.find_spec("onnxruntime_genai") is not None:
        out["generated"] = np.array(generate(directory, ids[0].tolist()), dtype=np.int64)
    save_file(out, sys.argv[3])


def generate(directory: str, ids: list[int]) -> list[int]:
    """Return the tokens that the model generates greedily after `ids`."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(directory)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + NEW_TOKENS, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(ids) :]


if __name__ == "__main__":
    main()
