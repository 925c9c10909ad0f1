"""One SFTTrainer run in a process of its own, round by round; `sft.py` starts it and talks to it.

    python sft_worker.py '{"variant": "qalora-4", "device": "cuda", "model": DIR, ...}'

It answers JSON lines. Each line `round` on stdin lets the trainer take `steps` more steps and is
answered with their seconds and losses; `memory` with the peak; the end of stdin ends it. It is one
training throughout: between rounds the trainer waits in a callback.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from typing import Any

import step_worker
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

LEARNING_RATE = 2e-4


def text(spec: dict[str, Any], rows: int) -> Dataset:
    """Token rows of a random language in which 4 tokens can follow each: something to learn."""
    generator = torch.Generator().manual_seed(1)
    follow = torch.randint(3, spec["vocab"], (spec["vocab"], 4), generator=generator)
    tokens = torch.randint(3, spec["vocab"], (rows, 1), generator=generator)
    columns = [tokens[:, 0]]
    for _ in range(spec["sequence"] - 1):
        choice = torch.randint(0, 4, (rows,), generator=generator)
        columns.append(follow[columns[-1], choice])
    return Dataset.from_dict({"input_ids": torch.stack(columns, 1).tolist()})


def load(spec: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """The base of a variant, and the PEFT config of its adapter."""
    from peft import LoraConfig

    common = {"r": spec["r"], "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    adapter: Any = LoraConfig(**common, target_modules=step_worker.TARGETS)
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    name, _, bits = spec["variant"].partition("-")
    if name == "qalora":
        from qalora_plugin import QALoRAConfig, QALoRAQuantConfig

        group_size = spec["group_size"]
        options["quantization_config"] = QALoRAQuantConfig(bits=int(bits), group_size=group_size)
        adapter = QALoRAConfig(**common, target_modules=step_worker.TARGETS)
    elif name == "qlora":
        import bitsandbytes  # noqa: F401 (a clear error where it is missing)
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    if spec["device"] == "cuda":
        options["device_map"] = {"": 0}
    return AutoModelForCausalLM.from_pretrained(spec["model"], **options), adapter


class Rounds(TrainerCallback):
    """Lets the trainer take `steps` steps for each `round` that is read."""

    def __init__(self, steps: int, device: str, answer: Any):
        self.steps, self.device, self.answer = steps, device, answer
        self.losses: list[float] = []
        self.begin = 0.0
        self.rounds = 0

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _next(self, control: Any) -> None:
        """Wait for a command and carry it out."""
        for line in sys.stdin:
            if line.strip() == "memory":
                self.answer(peak_bytes=step_worker.peak_bytes(self.device))
                continue
            self.losses = []
            self.begin = time.perf_counter()
            return
        control.should_training_stop = True

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        self._synchronize()
        tensors = [*model.parameters(), *model.buffers()]
        self.answer(ready=True, weight_bytes=sum(t.untyped_storage().nbytes() for t in tensors))
        self._next(control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        # after on_step_end of the step that it is about
        if "loss" not in (logs or {}):
            return
        self.losses.append(float(logs["loss"]))
        if state.global_step % self.steps:
            return
        self._synchronize()
        seconds = time.perf_counter() - self.begin
        self.rounds += 1
        self.answer(seconds=seconds, losses=self.losses)
        if self.rounds == 1:  # compiling, tuning and the optimizer's states are made by now
            step_worker.reset_peak(self.device)
        self._next(control)


def main() -> None:
    spec = json.loads(sys.argv[1])
    # answers go to a copy of stdout, which libraries that print cannot reach
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers)

    if spec["device"] == "cpu":
        torch.set_num_threads(spec["threads"])
    try:
        model, adapter = load(spec)
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=tempfile.mkdtemp(),
                max_steps=10_000,
                per_device_train_batch_size=spec["batch"],
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                max_length=spec["sequence"],
                use_cpu=spec["device"] == "cpu",
                bf16=spec["device"] == "cuda",
                report_to="none",
                save_strategy="no",
                logging_steps=1,
                gradient_checkpointing=spec["checkpointing"],
                disable_tqdm=True,
            ),
            train_dataset=text(spec, spec["dataset_rows"]),
            processing_class=AutoTokenizer.from_pretrained(spec["tokenizer"]),
            peft_config=adapter,
            callbacks=[Rounds(spec["steps"], spec["device"], answer)],
        )
        trainer.train()
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        answer(error=f"{type(error).__name__}: {line}")


if __name__ == "__main__":
    main()
