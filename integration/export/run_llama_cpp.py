"""Run a GGUF file in llama.cpp, in an environment without this project.

PYTHON run_llama_cpp.py MODEL.gguf INPUT.json -> one line of JSON

INPUT holds `text`, `ids` (a prompt) and `messages`. Printed are llama.cpp's tokens of the text, the
log-probabilities of all tokens after the prompt, and the answer to the messages.
"""

import importlib.util
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

THREADS = 2
ANSWER_TOKENS = 24


def main() -> None:
    assert importlib.util.find_spec("qalora_plugin") is None, "this environment holds the plugin"
    asked = json.loads(Path(sys.argv[2]).read_text())
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = 256
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.cpuparams.n_threads = THREADS
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            server.listening_address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    tokens = post("/tokenize", {"content": asked["text"], "add_special": True})["tokens"]
    vocabulary = len(asked["expected"])
    # an end of text would come without its probabilities
    body = {"prompt": asked["ids"], "n_predict": 1, "n_probs": vocabulary, "ignore_eos": True}
    first = post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
    logprobs = [0.0] * vocabulary
    for entry in first:
        logprobs[entry["id"]] = entry["logprob"]
    body = {"messages": asked["messages"], "max_tokens": ANSWER_TOKENS, "temperature": 0}
    answer = post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    print(json.dumps({"tokens": tokens, "logprobs": logprobs, "answer": answer}))


if __name__ == "__main__":
    main()
