"""TRL's trainers of preferences and rewards, the real ones: what they train is what is merged."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from support.training import TRAINING
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from qalora_plugin import MergeCallback, QALoRAConfig, quantize_model, verify_merge
from qalora_plugin.errors import ConfigError
from qalora_plugin.layers.linear import QuantLinear
from qalora_plugin.tuner import resuming

IDS = torch.arange(5, 25)[None]
BASE = Path(__file__).parents[2] / "qalora_plugin" / "quickstart" / "base_model"
PAIRS = [
    {"prompt": f"what is {n}?", "chosen": f" it is {n} and more", "rejected": f" no {n}"}
    for n in range(8)
]
ROWS = {
    "pairs": PAIRS,
    "labels": [
        {"prompt": row["prompt"], "completion": row[part], "label": part == "chosen"}
        for row in PAIRS
        for part in ("chosen", "rejected")
    ],
    "prompts": [{"prompt": row["prompt"]} for row in PAIRS],
}
TRAINERS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "dpo": (DPOTrainer, DPOConfig, "pairs", {}),
    "kto": (KTOTrainer, KTOConfig, "labels", {}),
    "orpo": (ORPOTrainer, ORPOConfig, "pairs", {}),
    "cpo": (CPOTrainer, CPOConfig, "pairs", {}),
    "reward": (RewardTrainer, RewardConfig, "pairs", {}),
    "grpo": (
        GRPOTrainer,
        GRPOConfig,
        "prompts",
        {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "max_length": None},
    ),
}


def length_reward(completions, **kwargs):
    """Reward completions that have many different characters."""
    return [float(len(set(completion))) for completion in completions]


@pytest.fixture
def make(tokenizer, tmp_path):
    """Build a trainer by its name; keywords of its config, and `adapter`, `callbacks`, `run`."""

    def build(name, model, *, adapter=None, callbacks=None, run="run", **settings):
        trainer, config, rows, own = TRAINERS[name]
        defaults = {
            **TRAINING,
            "output_dir": str(tmp_path / run),
            **own,
        }
        settings = {key: v for key, v in {**defaults, **settings}.items() if v is not None}
        more = {"reward_funcs": length_reward} if name == "grpo" else {}
        return trainer(
            model,
            args=config(**settings),
            train_dataset=Dataset.from_list(ROWS[rows]),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=callbacks,
            **more,
        )

    return build


def load(base, **options):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)


def adapter_for(name, **options):
    task = "SEQ_CLS" if name == "reward" else "CAUSAL_LM"
    return QALoRAConfig(r=4, lora_alpha=8, task_type=task, **options)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    """The quickstart's model at 4 bits."""
    out = tmp_path_factory.mktemp("quickstart") / "int4"
    return quantize_model(BASE, out, bits=4, group_size=32, method="rtn", progress=False).out


@pytest.mark.parametrize("name", TRAINERS)
def test_ten_steps_on_the_quickstarts_base_are_what_is_merged(name, quickstart, make, tmp_path):
    head = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    options: dict[str, Any] = {"num_labels": 1, "pad_token_id": 1} if name == "reward" else {}
    torch.manual_seed(0)
    model = head.from_pretrained(quickstart, dtype=torch.float32, **options)
    callbacks = [MergeCallback(tmp_path / "merged")]
    trainer = make(name, model, adapter=adapter_for(name), callbacks=callbacks, max_steps=10)
    start = logits(trainer.model)
    trainer.train()
    trained = logits(trainer.model)
    assert not torch.equal(start, trained)
    merged = head.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert torch.equal(trained, logits(merged))
    assert verify_merge(tmp_path / "merged", tmp_path / "run" / "adapter", quickstart).layers == 28


@pytest.fixture
def start(bases, tmp_path):
    """A trained adapter to start from: its B is not 0."""
    model = get_peft_model(load(bases["ours"]), adapter_for("dpo", init_lora_weights=False))
    model.save_pretrained(tmp_path / "start")
    return lambda: PeftModel.from_pretrained(
        load(bases["ours"]), tmp_path / "start", is_trainable=True
    )


def adapters(model):
    """The parameters of the policy and of the reference."""
    parts = (".default.", ".ref.")
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if any(part in name for part in parts)
    }


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo"])
def test_from_a_trained_adapter_resumed_equals_uninterrupted(name, make, start, tmp_path):
    """TRL adds a copy "ref" of it; the Trainer then loads that copy alone, and not the policy."""
    saving = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5}
    callback = MergeCallback(tmp_path / "whole")
    whole = make(name, start(), callbacks=[callback], **saving)
    reference = {n: p for n, p in adapters(whole.model).items() if ".ref." in n}
    assert reference
    whole.train()
    wanted = adapters(whole.model)
    for key, before in reference.items():
        assert torch.equal(wanted[key], before)
        assert not torch.equal(wanted[key.replace(".ref.", ".default.")], before)
    resumed = make(name, start(), callbacks=[MergeCallback(tmp_path / "resumed")], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    same_adapters(resumed.model, wanted)
    assert torch.equal(logits(load(tmp_path / "whole")), logits(load(tmp_path / "resumed")))
    assert torch.equal(logits(load(tmp_path / "whole")), logits(whole.model))


def same_adapters(model, wanted):
    found = adapters(model)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert torch.equal(found[key], wanted[key]), key


def test_resumed_without_our_callback_and_from_another_directory(make, start, tmp_path):
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make("dpo", start(), **saving)
    whole.train()
    resumed = make("dpo", start(), run="b", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    same_adapters(resumed.model, adapters(whole.model))


def test_a_policy_that_would_be_lost_is_refused(make, start, tmp_path, monkeypatch):
    """Where the checkpoint lacks it, and where something else loads another one."""
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make("dpo", start(), **saving).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda *arguments: None)
    monkeypatch.setattr(resuming, "install", lambda: None)
    trainer = make("dpo", start(), callbacks=[MergeCallback(tmp_path / "m")], **saving)
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint: .* is not what .*checkpoint-1"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    monkeypatch.undo()
    (checkpoint / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"checkpoint-1: expected adapter_model\.safetensors"):
        make("dpo", start(), **saving).train(resume_from_checkpoint=str(checkpoint))


def test_an_adapter_that_was_loaded_for_inference_is_refused(bases, make, start, tmp_path):
    start()
    model = PeftModel.from_pretrained(load(bases["ours"]), tmp_path / "start")
    trainer = make("dpo", model, callbacks=[MergeCallback(tmp_path / "m")])
    with pytest.raises(ConfigError, match="is_trainable=True"):
        trainer.train()


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_reward_model_whose_head_nothing_saves_is_refused(kind, bases, make, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(
        bases[kind], dtype=torch.float32, num_labels=1, pad_token_id=1
    )
    callbacks = [MergeCallback(tmp_path / "merged")]
    trainer = make("reward", model, adapter=QALoRAConfig(r=4), callbacks=callbacks)
    with pytest.raises(ConfigError, match=r"score is not in the files .*SEQ_CLS"):
        trainer.train()


class _Recorded(GRPOTrainer):
    """GRPOTrainer, and what it computes: the log-probabilities of tokens in a training step."""

    def _get_per_token_logps_and_entropies(self, model, ids, mask, keep, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, ids, mask, keep, *args, **kwargs)
        self.seen += [(ids, keep, mask, found[0].detach())] if torch.is_grad_enabled() else []
        return found


def rollout(trainer, kept):
    """Have the model's own `generate` keep the log-probabilities of the tokens that it draws."""
    generate = trainer.model.generate

    def recorded(**options):
        config = options.pop("generation_config")
        config.return_dict_in_generate = config.output_logits = True
        out = generate(**options, generation_config=config)
        drawn = out.sequences[:, -len(out.logits) :]
        logps = torch.stack(out.logits, 1).float().log_softmax(-1)
        kept.append((out.sequences, logps.gather(-1, drawn[..., None])[..., 0]))
        return out.sequences

    trainer.model.generate = recorded


def test_grpo_rolls_out_the_weights_that_it_trains(bases, make, tmp_path, monkeypatch):
    """In fp32 within 1e-5, after every step, and the merged model draws with the same numbers."""
    own = {"num_generations": 2, "max_completion_length": 6, "beta": 0.0, "max_length": None}
    monkeypatch.setitem(TRAINERS, "grpo", (_Recorded, GRPOConfig, "prompts", own))
    callbacks = [MergeCallback(tmp_path / "merged")]
    trainer = make(
        "grpo", load(bases["ours"]), adapter=adapter_for("grpo"), callbacks=callbacks, max_steps=5
    )
    trainer.seen, rollouts = [], []
    rollout(trainer, rollouts)
    trainer.train()
    assert len(rollouts) == len(trainer.seen) == 5
    compared = 0
    for (sequences, drawn), (ids, keep, mask, logps) in zip(rollouts, trainer.seen, strict=True):
        for row, wanted in zip(sequences, drawn, strict=True):
            own_rows = [i for i in range(len(ids)) if same_tokens(ids[i], mask[i], row, trainer)]
            assert own_rows
            length = int(mask[own_rows[0], -keep:].sum())
            assert (logps[own_rows[0], :length] - wanted[:length]).abs().max() < 1e-5
            compared += length
    assert compared > 30


def same_tokens(ids, mask, sequence, trainer):
    """Whether a row of the trainer, without its padding, is this rollout up to its end."""
    pad = trainer.model.config.pad_token_id
    row, drawn = ids[mask.bool()].tolist(), sequence[sequence != pad].tolist()
    return drawn[: len(row)] == row


def peak_bytes(call):
    """Return how many more bytes of tensors there are at a time than before, and the result."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    total = peak = 0
    for event in profile.profiler.kineto_results.events():
        total += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, total)
    return peak, result


def test_grpo_rolls_out_without_a_second_copy_of_the_weights(quickstart, make):
    """The peak of a rollout is below the packed weights, and far below 16-bit ones.

    The first product in a process also makes the kernel's workspace, which later ones share.
    """
    trainer = make("grpo", load(quickstart), adapter=adapter_for("grpo"))
    layers = [layer for layer in trainer.model.modules() if isinstance(layer, QuantLinear)]
    held = [t for layer in layers for t in (layer.qweight, layer.scales, layer.offsets)]
    packed = sum(tensor.numel() * tensor.element_size() for tensor in held)
    generate, peaks = trainer.model.generate, []

    def measured(**options):
        peak, result = peak_bytes(lambda: generate(**options))
        peaks.append(peak)
        return result

    trainer.model.generate = measured
    trainer.train()
    copied, _ = peak_bytes(lambda: [tensor.clone() for tensor in held])
    assert copied >= packed  # the measure sees a copy
    first, second = peaks
    assert first < packed and 0 < second < packed / 2
