"""Run an ONNX directory with ONNX Runtime and onnxruntime-genai, without this project.

PYTHON run_onnx.py MODEL_DIR INPUT.safetensors OUT.safetensors -> one line of JSON

INPUT holds `input_ids` int64 [B, T]; OUT gets `logits` fp32 [B, T, vocab]. The line holds what
onnxruntime-genai generates after the first row, through its KV cache.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import onnxruntime_genai
from safetensors.numpy import load_file, save_file

NEW_TOKENS = 16


def main() -> None:
    assert importlib.util.find_spec("qalora_plugin") is None, "this environment holds the plugin"
    directory, ids = sys.argv[1], load_file(sys.argv[2])["input_ids"]
    session = onnxruntime.InferenceSession(str(Path(directory) / "model.onnx"))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    settings = json.loads((Path(directory) / "genai_config.json").read_text())["model"]["decoder"]
    empty = (ids.shape[0], settings["num_key_value_heads"], 0, settings["head_size"])
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            inputs[entry.name] = np.zeros(empty, dtype=np.float32)
    (logits,) = session.run(["logits"], inputs)
    save_file({"logits": logits}, sys.argv[3])

    model = onnxruntime_genai.Model(directory)
    params = onnxruntime_genai.GeneratorParams(model)
    params.set_search_options(max_length=ids.shape[1] + NEW_TOKENS, do_sample=False)
    generator = onnxruntime_genai.Generator(model, params)
    generator.append_tokens(ids[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)]
    print(json.dumps({"generated": tokens[ids.shape[1] :]}))


if __name__ == "__main__":
    main()
