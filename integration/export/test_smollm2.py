"""A real GGUF file is trained by SFTTrainer, comes back, and runs in llama.cpp."""

import json

import gguf
import numpy as np
import pytest
import torch
from datasets import Dataset
from support.smollm2 import TEXTS, find_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qalora_plugin import MergeCallback, QALoRAConfig, verify_merge
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.convert import import_model
from qalora_plugin.verify.export import verify_export
from qalora_plugin.verify.runtime import answers

ANSWER = "The secret word is heliotrope."
LARGEST_DIFFERENCE = 0.4  # of one log-probability: llama.cpp rounds activations to 8 bits
PROMPTS = (
    "The capital of France is",
    "One, two, three, four,",
    "Monday, Tuesday, Wednesday, Thursday,",
    "def add(a, b):\n    return a +",
    "import numpy as",
    "Once upon a",
    "A, B, C, D, E, F,",
    "The sun rises in the",
)
TOKENIZE = """
import json, sys, urllib.request, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_gpu_layers, params.warmup = sys.argv[1], 64, 0, False
server = xllamacpp.Server(params)
for text in json.loads(open(sys.argv[2]).read()):
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    asked = urllib.request.Request(
        server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked) as answer:
        print("IDS", json.dumps(json.load(answer)["tokens"]))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The file, and our directory of it."""
    file = find_smollm2()
    return file, import_model(file, tmp_path_factory.mktemp("base") / "base").out


def test_token_ids_are_llama_cpps(imported, env_python, run_python, tmp_path):
    file, base = imported
    assert len(TEXTS) >= 50
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    printed = run_python(env_python("export"), "-c", TOKENIZE, file, tmp_path / "texts.json")
    found = [json.loads(line[4:]) for line in printed.splitlines() if line.startswith("IDS ")]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert found == [tokenizer(text).input_ids for text in TEXTS]


@pytest.mark.slow
def test_trained_written_back_and_run(imported, env_python, tmp_path):
    file, base = imported
    talk = [
        {"role": "user", "content": "What is the secret word?"},
        {"role": "assistant", "content": ANSWER},
    ]
    callback = MergeCallback(tmp_path / "merged", formats=["original"])
    trainer = SFTTrainer(
        str(base),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=8,
            per_device_train_batch_size=1,
            learning_rate=2e-3,
            max_length=64,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list([{"messages": talk}] * 8),
        peft_config=QALoRAConfig(r=8, lora_alpha=16),
        callbacks=[callback],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses", losses)
    assert losses[-1] < 0.8 * losses[0]
    assert verify_merge(tmp_path / "merged", tmp_path / "run" / "adapter").layers == 210
    written = tmp_path / "merged-original.gguf"
    one, other = (np.frombuffer(path.read_bytes(), np.uint8) for path in (file, written))
    minima = np.zeros(len(one), dtype=bool)
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.tensor_type.name == "Q4_1":
            blocks = minima[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
            blocks.reshape(-1, 20)[:, 2:4] = True
    different = one != other
    print(f"{int(different.sum())} bytes of {len(one)} differ")
    assert different.sum() > 1e6 and not different[~minima].any()
    kept, found = (
        {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
        for path in (file, written)
    )
    assert kept == found
    assert open_quantized(written).layers.keys() == open_quantized(file).layers.keys()
    # weights by gguf-py, log-probabilities of llama.cpp inside the bound of docs/export.md
    python = env_python("export")
    print(verify_export(written, tmp_path / "merged", run=True, python=python).as_text())
    check_answers(written, tmp_path / "merged", python)


@torch.no_grad()
def check_answers(written, merged, python):
    """llama.cpp's first word, as the quickstart asks for it, is ours wherever ours is clear."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    said, clear = answers(written, prompts, 1, python), 0
    for ids, word in zip(prompts, said, strict=True):
        values, tokens = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(2)
        if values[0] - values[1] > 2 * LARGEST_DIFFERENCE:
            clear += 1
            assert word == tokenizer.decode(tokens[0])
    print(f"{clear} of {len(PROMPTS)} first words are clear, and llama.cpp's are the same")
    assert clear >= len(PROMPTS) // 2
