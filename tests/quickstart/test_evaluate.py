"""The held-out loss of the quickstart, and how its result is printed."""

import json

import pytest
import torch
from datasets import Dataset
from support.models import llama
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from qalora_plugin.errors import ConfigError
from qalora_plugin.quickstart.embedded import base_model_path
from qalora_plugin.quickstart.evaluate import IGNORED, MAX_LENGTH, encode, held_out_loss
from qalora_plugin.quickstart.job import Row, _chat
from qalora_plugin.quickstart.report import as_json, as_text
from qalora_plugin.quickstart.run import Result, Sample

ROWS = [
    {"prompt": "### Task\nAdd.\n", "completion": "def add(a, b):\n    return a + b\n"},
    {"text": "import sys\n"},
    {"text": ""},
    {"prompt": "# long\n" * MAX_LENGTH, "completion": "cut off"},
]


def test_the_loss_is_that_of_each_row_alone():
    """Rows of different lengths in a batch: completions and plain texts count, prompts do not."""
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    model = llama(vocab_size=2048, max_position_embeddings=MAX_LENGTH)
    total, count = 0.0, 0
    for row in ROWS:
        text = row.get("text", row.get("prompt", "") + row.get("completion", ""))
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id][:MAX_LENGTH]
        skipped = len(tokenizer(row["prompt"])["input_ids"]) if "prompt" in row else 1
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for position in range(max(skipped, 1), len(ids)):
            total -= logits[position - 1, ids[position]].item()
            count += 1
    found = held_out_loss(model.train(), tokenizer, ROWS, batch_size=2)
    assert found == pytest.approx(total / count, rel=1e-5)
    assert model.training


@pytest.fixture
def with_start():
    """The embedded tokenizer, made to begin every text with <|bos|>, as Llama's and Gemma's do."""
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    start = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer.backend_tokenizer.post_processor = start
    return tokenizer


def test_rows_are_judged_as_they_are_trained(with_start, tmp_path):
    """Token ids and labels are those of TRL, the first token among them."""
    for kind in (ROWS[:1], [{"text": "import sys\n"}]):
        trainer = SFTTrainer(
            llama(vocab_size=2048),
            args=SFTConfig(str(tmp_path), use_cpu=True, report_to="none", max_length=MAX_LENGTH),
            train_dataset=Dataset.from_list(kind),
            processing_class=with_start,
        )
        batch = trainer.data_collator([trainer.train_dataset[0]])
        ids, labels = encode(with_start, kind[0])
        assert ids[0] == with_start.bos_token_id
        assert ids == batch["input_ids"][0].tolist()
        assert labels == batch["labels"][0].tolist()


def test_a_chat_begins_once(with_start):
    with_start.chat_template = "{{ bos_token }}{{ messages[0].content }}|"
    row = _chat({"prompt": "add\n", "completion": "x"}, with_start, None)
    assert row == {"prompt": "add|", "completion": "x"}
    with_start.backend_tokenizer.post_processor = TemplateProcessing(single="$A")
    row = _chat({"prompt": "add\n", "completion": "x"}, with_start, None)
    assert row["prompt"] == "<|bos|>add|"  # which nothing else would write


def test_a_template_without_a_system_role_gets_the_task_before_the_prompt(with_start):
    refuse = "{{ raise_exception('System role not supported') }}"
    with_start.chat_template = (
        "{% if messages[0].role == 'system' %}" + refuse + "{% endif %}<{{ messages[0].content }}>"
    )
    row = _chat({"prompt": "add\n", "completion": "x"}, with_start, "Say what it does.")
    assert row == {"prompt": "<Say what it does.\n\nadd>", "completion": "x"}


def test_rows_without_a_token_to_predict_are_refused():
    tokenizer = AutoTokenizer.from_pretrained(base_model_path())
    ids, labels = encode(tokenizer, ROWS[-1])
    assert len(ids) == MAX_LENGTH
    assert set(labels) == {IGNORED}
    with pytest.raises(ConfigError, match="found none: give shorter prompts"):
        held_out_loss(llama(vocab_size=2048), tokenizer, ROWS[-1:])


def test_the_result_is_a_table_and_the_same_as_json():
    names = ("16-bit base", "INT4 base", "INT4 + adapter", "merged")
    rows = [Row(name, 3 - n / 4, (n + 1) * 10**6, 16 - n) for n, name in enumerate(names)]
    paths, seconds = {"adapter": "out/adapter"}, {"quantize": 1.4, "train": 2.6}
    rows.append(Row("merged, GGUF", None, 10**6, 5))
    samples = [Sample("a\nb", "", "c", "d"), Sample("e", "f", "g", "h", "i")]
    result = Result(rows, True, 28, samples, paths, seconds, "run in llama.cpp", {"peak": 19e8})
    lines = as_text(result).splitlines()
    assert lines[3] == "INT4 base              2.7500       2.00 MB        15.00"
    assert lines[6] == "merged, GGUF                -       1.00 MB         5.00"
    assert "held-out loss, trained against the 16-bit base: -0.7500" in lines
    assert "run in llama.cpp" in lines
    assert lines[lines.index("prompt:") + 1 :][:2] == ["    a", "    b"]
    assert lines.count("expected:") == lines.count("after, in llama.cpp:") == 1
    assert lines[-3:-1] == ["adapter:   out/adapter", "time:      quantize 1 s, train 3 s"]
    assert lines[-1] == "memory:    peak 1.9 GB"
    found = json.loads(as_json(result))
    assert found["rows"][3] == {
        "name": "merged", "loss": 2.25, "size": 4000000, "bits_per_weight": 13
    }  # fmt: skip
    assert (found["verified_layers"], found["seconds"]) == (28, seconds)
