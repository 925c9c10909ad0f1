"""Run a GGUF file in llama.cpp, through xllamacpp; this package is not needed.

PYTHON run.py MODEL.gguf INPUT.safetensors OUT.safetensors [ASKED.json]

INPUT holds `input_ids` int64 [B, T]; OUT gets `logprobs` fp32 [B, vocab], of the token after each
row. ASKED holds `text` and chat `messages`, or `prompts` as token ids and `answer_tokens`. Prints
one line of JSON: llama.cpp's tokens of the text and its answer to the messages, or its greedy
`answers`.
"""

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from safetensors.numpy import load_file, save_file

THREADS = 2
ANSWER_TOKENS = 24
ATTEMPTS = 20
ALL = 1 << 24  # more tokens than any vocabulary has


def start(model: str, length: int) -> xllamacpp.Server:
    """Start a server that rounds nothing that it need not round."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = max(256, length)
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.cpuparams.n_threads = THREADS
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def main() -> None:
    """Run the model on the input, and write what it computes."""
    input_ids = load_file(sys.argv[2])["input_ids"]
    asked = json.loads(Path(sys.argv[4]).read_text()) if sys.argv[4:] else {}
    longest = max([input_ids.shape[1], *map(len, asked.get("prompts", []))])
    tokens = asked.get("answer_tokens", ANSWER_TOKENS)
    server = start(sys.argv[1], longest + tokens)

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def logprobs(ids: list[int]) -> list[dict[str, Any]]:
        # probabilities are those before sampling, but an end of text and a part of a character come
        # without them: so any token is drawn, and another one if need be
        any_token = {"temperature": 1e3, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True}
        for seed in range(ATTEMPTS):
            body = {"prompt": ids, "n_predict": 1, "n_probs": ALL, "seed": seed, **any_token}
            found = post("/completion", body).get("completion_probabilities")
            if found:
                return found[0]["top_logprobs"]
        raise RuntimeError(f"no probabilities of the token after {len(ids)} tokens")

    rows = []
    for ids in input_ids.tolist():
        found = logprobs(ids)
        row = np.full(len(found), np.nan, dtype=np.float32)
        for entry in found:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    save_file({"logprobs": np.stack(rows)}, sys.argv[3])
    result: dict[str, Any] = {}
    if "prompts" in asked:
        greedy = {"n_predict": asked["answer_tokens"], "temperature": 0}
        result["answers"] = [
            post("/completion", {"prompt": ids, **greedy})["content"] for ids in asked["prompts"]
        ]
    elif asked:
        body = {"content": asked["text"], "add_special": True}
        result["tokens"] = post("/tokenize", body)["tokens"]
        body = {"messages": asked["messages"], "max_tokens": ANSWER_TOKENS, "temperature": 0}
        answer = post("/v1/chat/completions", body)
        result["answer"] = answer["choices"][0]["message"]["content"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
