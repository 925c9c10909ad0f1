"""GRPO with rollouts from vLLM: a real trainer here, a real engine in its own environment."""

import json
import os
import subprocess

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from qalora_plugin import QALoRAConfig
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.training.rollouts import changed_tensors, send_changes

TOKENS = 6
PROMPTS = ["def add(a, b):", "class Node:", "import os"]


class Engine:
    """The process of rollout_engine.py."""

    def __init__(self, process, folder):
        self.process, self.folder = process, folder

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        log = (self.folder / "stderr").read_text()[-4000:]
        raise AssertionError(f"the engine ended with {self.process.wait()}:\n{log}")

    def load(self, tensors):
        save_file({name: t.contiguous() for name, t in tensors.items()}, self.folder / "weights")
        return self.ask(weights=str(self.folder / "weights"))


@pytest.fixture(scope="module")
def base(quickstart):
    return quickstart / "base"


@pytest.fixture(scope="module")
def engine(env_python, vllm_environment, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | vllm_environment
    command = [env_python("vllm"), "integration/vllm/rollout_engine.py", base]
    with (folder / "stderr").open("w") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
    engine = Engine(process, folder)
    assert engine.answer() == {"ready": True}
    yield engine
    process.stdin.close()
    process.wait(60)


@torch.no_grad()
def trained_logprobs(model, ids, completion):
    """Return the log-probabilities of a completion as the model in training has them."""
    logits = model(input_ids=torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("adapt", ["zeros", "both"])
def test_vllm_rolls_out_what_is_trained_after_every_sync(adapt, base, engine, tmp_path):
    """Within 5e-5 in fp32; and the bytes of a step are those of the scales and offsets."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    sent, worst, stale = [], [], []

    def compare(trainer, ids, drawn):
        logprobs = zip(ids, drawn["completions"], drawn["logprobs"], strict=True)
        return max(
            (trained_logprobs(trainer.model, prompt, completion) - torch.tensor(found)).abs().max()
            for prompt, completion, found in logprobs
        )

    def roll_out(prompts, trainer):
        ids = [tokenizer(prompt).input_ids for prompt in prompts]
        if sent:  # what a sync that is left out would cost
            stale.append(compare(trainer, ids, engine.ask(ids=ids, tokens=TOKENS)))
        tensors = {}
        sent.append(send_changes(trainer.model, tensors.__setitem__))
        assert engine.load(tensors) == {"loaded": sent[-1].tensors}
        drawn = engine.ask(ids=ids, tokens=TOKENS)
        worst.append(compare(trainer, ids, drawn))
        drawn["logprobs"] = [[[value] for value in row] for row in drawn["logprobs"]]
        return {
            "prompt_ids": ids,
            "completion_ids": drawn["completions"],
            "logprobs": drawn["logprobs"],
        }

    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        lambda completions, **_: [float(len(set(c))) for c in completions],
        args=GRPOConfig(
            str(tmp_path / "run"),
            max_steps=4,
            num_generations=2,
            per_device_train_batch_size=2,
            max_completion_length=TOKENS,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 4]),
        processing_class=tokenizer,
        peft_config=QALoRAConfig(r=4, lora_alpha=8, adapt=adapt, task_type="CAUSAL_LM"),
        rollout_func=roll_out,
    )
    trainer.train()
    assert len(worst) == 4 and max(worst) < 5e-5
    assert max(stale) > 1e-3
    kinds = (".offsets",) if adapt == "zeros" else (".offsets", ".scales")
    checkpoint = open_quantized(base)
    stored = [t for name, t in checkpoint.reader.tensors.items() if name.endswith(kinds)]
    expected = sum(checkpoint.reader.get(t.name).nbytes for t in stored)
    assert {found.nbytes for found in sent} == {expected}
    assert {found.layers for found in sent} == {len(checkpoint.layers)} == {28}
    print(f"{adapt}: {expected} bytes a step, worst {max(worst):.1e}, stale {max(stale):.1e}")


def test_what_the_engine_cannot_take_is_refused_by_name(base, engine):
    """Wrong shapes, dtypes and numbers; it then answers as before."""
    name = "model.layers.0.mlp.down_proj.offsets"
    good = open_quantized(base).reader.get(name)
    for bad, message in (
        (good[:1], f"{name}: expected torch.float16 "),
        (good.float(), f"{name}: expected torch.float16 "),
        (good[:, :8], "expected "),
        (good * float("nan"), f"{name}: holds NaN"),
    ):
        assert message in engine.load({name: bad})["error"]
    assert engine.load({name: good}) == {"loaded": 1}


def test_a_diverged_adapter_is_not_sent(base):
    from peft import get_peft_model

    from qalora_plugin.errors import AdapterError

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, QALoRAConfig(r=2, task_type="CAUSAL_LM"))
    next(p for p in adapted.parameters() if p.requires_grad).data.fill_(float("inf"))
    with pytest.raises(AdapterError, match="diverged"):
        dict(changed_tensors(adapted))
