"""The whole way on one machine: INT-n base -> QA-LoRA -> merged INT-n, measured."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

from ..errors import VerificationError
from ..quantize.calibration import special_tokens
from ..report.figures import peak_memory
from ..report.page import write_report
from ..verify.export import verify_export
from ..verify.merge import verify_merge
from ..verify.runtime import answers
from .evaluate import MAX_LENGTH, row_text
from .job import CALIBRATION_SAMPLES, Job, Row, prepare
from .settings import Settings

_ANSWER_TOKENS = {True: 32, False: 96}
"""Of a GGUF file and of a 16-bit model."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out prompt, the answer that its author wrote, and those of the models."""

    prompt: str
    expected: str
    before: str
    after: str
    llama_cpp: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of a quickstart, and where it wrote everything."""

    rows: list[Row]
    merged_equals_unmerged: bool
    verified_layers: int
    samples: list[Sample]
    paths: dict[str, str]
    seconds: dict[str, float]
    runtime: str | None = None
    """What llama.cpp computes of the written GGUF file, or why it was not run."""
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    """The largest resident memory in bytes, by what held it."""


def run(settings: Settings, say: Callable[[str], None] = print) -> Result:
    """Quantize unless the base is, train, merge, verify, and measure each stage on held-out rows.

    Args:
        settings: see `Settings`.
        say: takes one line of progress at a time.

    Raises:
        ConfigError: bad settings, before anything is written.
        CheckpointError: the model is quantized already, incomplete or damaged; likewise.
        QuantizationError: too little text to calibrate on; likewise.
        VerificationError: the merged model is not what was trained.
    """
    job = prepare(settings)
    paths, seconds, rows = job.paths, {}, []
    say(
        f"base: {job.file or job.source} ({len(job.training)} training rows, "
        f"{len(job.held_out)} held out)"
    )
    if job.file is None:
        rows.append(job.measure("16-bit base", job.load(job.source), job.source))
        say(f"quantizing to INT{settings.bits}, groups of {settings.group_size}, GPTQ ...")
        started = time.monotonic()
        _quantize(job)
        seconds["quantize"] = time.monotonic() - started
    width = "GGUF" if job.file else f"INT{settings.bits}"
    model = job.load(job.base)
    rows.append(job.measure(f"{width} base", model, job.file or job.base))
    before = _answers(job, model)

    say(f"training a QA-LoRA adapter of rank {settings.rank}, {settings.steps} steps ...")
    started = time.monotonic()
    trained, history = _train(job, model)
    seconds["train"] = time.monotonic() - started
    base = job.file or job.base
    rows.append(job.measure(f"{width} + adapter", trained, base, paths["adapter"]))

    say("verifying the merged checkpoint ...")
    started = time.monotonic()
    report = verify_merge(paths["merged"], paths["adapter"], job.base)
    merged = job.load(paths["merged"])
    equal = _check_logits(job, merged, trained)
    seconds["verify"] = time.monotonic() - started
    rows.append(job.measure("merged", merged, paths["merged"]))
    after = _answers(job, merged)
    runtime: str | None = None
    others: list[str] | list[None] = [None] * len(after)
    if job.file is not None:
        say("comparing the written GGUF file with the merged model, and running it ...")
        started = time.monotonic()
        written = verify_export(paths["gguf"], paths["merged"], run=True)
        runtime, others = written.as_text(), _answers_of_llama_cpp(job) or others
        rows.append(job.measure("merged, GGUF", None, paths["gguf"]))
        seconds["gguf"] = time.monotonic() - started
    texts = [sample | {"before": text} for sample, text in zip(job.samples, before, strict=True)]
    result = Result(
        rows=rows,
        merged_equals_unmerged=equal,
        verified_layers=report.layers,
        samples=[
            Sample(**known, after=text, llama_cpp=other)
            for known, text, other in zip(texts, after, others, strict=True)
        ],
        paths={name: str(path) for name, path in paths.items()},
        seconds=seconds,
        runtime=runtime,
        memory=peak_memory(),
    )
    measured = dataclasses.asdict(result)
    page = write_report(
        settings.out,
        history=history,
        proof=report.as_dict(),
        settings={"steps": settings.steps, "learning_rate": settings.learning_rate},
        **{name: measured[name] for name in ("rows", "samples", "seconds", "memory")},
    )
    result.paths["report"] = str(page)
    return result


def _quantize(job: Job) -> None:
    from ..quantize.pipeline import quantize_model

    settings = job.settings
    quantize_model(
        job.source,
        job.paths["base-int"],
        bits=settings.bits,
        group_size=settings.group_size,
        offsets_at=settings.offsets_at,
        method="gptq",
        calibration=job.windows,
        samples=CALIBRATION_SAMPLES,
        seq_len=MAX_LENGTH,
        seed=settings.seed,
    )


def _train(job: Job, model: Any) -> tuple[Any, list[dict[str, Any]]]:
    """Train with an SFTTrainer as a user writes it, which writes adapter and merge.

    Returns the model and the trainer's log.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ..training.callback import MergeCallback
    from ..tuner import QALoRAConfig

    settings, gpu = job.settings, torch.cuda.is_available()
    formats = ["original"] if job.file else []
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(job.paths["training"]),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 20),
            max_length=MAX_LENGTH,
            bf16=gpu,
            use_cpu=not gpu,
            gradient_checkpointing=False,
            logging_steps=max(1, settings.steps // 10),
            save_strategy="no",
            report_to="none",
            seed=settings.seed,
        ),
        train_dataset=Dataset.from_list(job.training),
        processing_class=job.tokenizer,
        peft_config=QALoRAConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, seed=settings.seed, task_type="CAUSAL_LM"
        ),
        callbacks=[MergeCallback(job.paths["merged"], formats=formats, report=False)],
    )
    trainer.train()
    trainer.save_model(str(job.paths["adapter"]))
    return trainer.model.eval(), trainer.state.log_history


@torch.no_grad()
def _check_logits(job: Job, merged: Any, trained: Any) -> bool:
    """Return True; raise VerificationError where the two models compute different logits."""
    ids = job.tokenizer(row_text(job.held_out[0]), return_tensors="pt")["input_ids"]
    ids = ids[:, :MAX_LENGTH].to(merged.device)
    if not torch.equal(merged(input_ids=ids).logits, trained(input_ids=ids).logits):
        raise VerificationError(f"{job.paths['merged']}: logits differ from the trained model's")
    return True


def _prompts(job: Job) -> list[list[int]]:
    """Return the token ids of the prompts whose answers are shown."""
    start, _ = special_tokens(job.tokenizer)
    room = MAX_LENGTH - _ANSWER_TOKENS[job.settings.is_gguf] - len(start)
    rows = job.held_out[: len(job.samples)]
    texts = [row.get("prompt") or row["text"][:200] for row in rows]
    found = (job.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    return [start + ids[-room:] for ids in found]


@torch.no_grad()
def _answers(job: Job, model: Any) -> list[str]:
    """Return the greedy continuation of each prompt, of a toy with repetitions penalised."""
    tokenizer, found = job.tokenizer, []
    for prompt in _prompts(job):
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_ANSWER_TOKENS[job.settings.is_gguf],
            do_sample=False,
            repetition_penalty=1.0 if job.file else 1.2,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def _answers_of_llama_cpp(job: Job) -> list[str] | None:
    """Return what llama.cpp answers with the written file; None where it is not installed."""
    return answers(job.paths["gguf"], _prompts(job), _ANSWER_TOKENS[True])
