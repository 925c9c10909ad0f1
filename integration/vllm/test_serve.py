"""`vllm serve` on loopback: a quantized base, and our LoRA export beside it, over HTTP in fp32."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from qalora_plugin.formats.export import export_model

PROMPT = "KING HENRY:\nWhat"
MESSAGES = [{"role": "user", "content": "Write a line of a play."}]
TOKENS = 24
STARTING = 180  # seconds


def post(address, path, body):
    request = urllib.request.Request(
        f"{address}/v1/{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def lora(quickstart):
    export_model(quickstart / "adapter", quickstart / "lora", "lora", base=quickstart / "base")
    return quickstart / "lora"


@pytest.fixture(scope="module")
def server(quickstart, lora, env_python, vllm_environment, tmp_path_factory):
    """The address of a server of the base, named "base", and of the LoRA, named "adapter"."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [env_python("vllm").parent / "vllm", "serve", quickstart / "base"]
    command += ["--host", "127.0.0.1", "--port", port, "--served-model-name", "base"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", 256]
    command += ["--enable-lora", "--max-lora-rank", 8, "--lora-modules", f"adapter={lora}"]
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **vllm_environment}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # the server's engine is another process
    with open(log, "w") as out:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(STARTING):
            assert process.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-4000:])
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


@torch.no_grad()
def greedy(model, ids):
    """Return the tokens that follow, and their log probabilities."""
    options = {"do_sample": False, "eos_token_id": None, "max_new_tokens": TOKENS}
    out = model.generate(input_ids=ids, min_new_tokens=TOKENS, **options)
    logprobs = model(input_ids=out).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    tokens = out[0, ids.shape[1] :]
    return tokens.tolist(), logprobs.gather(1, tokens[:, None])[:, 0]


@pytest.fixture(scope="module")
def tokenizer(quickstart):
    return AutoTokenizer.from_pretrained(quickstart / "base")


@pytest.fixture(scope="module")
def model(quickstart):
    return AutoModelForCausalLM.from_pretrained(quickstart / "base", dtype=torch.float32)


def complete(address, name, tokenizer):
    body = {"model": name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    body |= {"logprobs": 1, "ignore_eos": True, "return_token_ids": True}
    return post(address, "completions", body)["choices"][0]


def assert_same(choice, logprobs, expected, atol=5e-5):
    tokens, ours = expected
    assert choice["token_ids"] == tokens
    torch.testing.assert_close(torch.tensor(logprobs), ours, atol=atol, rtol=0)


def test_completions(server, model, tokenizer):
    choice = complete(server, "base", tokenizer)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert_same(choice, choice["logprobs"]["token_logprobs"], greedy(model, ids))


def test_chat(server, model, tokenizer):
    body = {"model": "base", "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    body |= {"logprobs": True, "ignore_eos": True, "return_token_ids": True}
    choice = post(server, "chat/completions", body)["choices"][0]
    ids = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    logprobs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
    assert_same(choice, logprobs, greedy(model, ids))


def test_the_lora_export_beside_it(server, quickstart, tokenizer):
    choice = complete(server, "adapter", tokenizer)
    base = AutoModelForCausalLM.from_pretrained(quickstart / "base", dtype=torch.float32)
    trained = PeftModel.from_pretrained(base, quickstart / "adapter").eval()
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = greedy(trained, ids)
    # the adapter is trained with offsets rounded to fp16, which plain LoRA does not do
    assert_same(choice, choice["logprobs"]["token_logprobs"], expected, atol=1e-3)
    assert expected[0] != complete(server, "base", tokenizer)["token_ids"]  # and is not the base
