"""The whole way on one machine: 16-bit base -> INT-n -> QA-LoRA -> merged INT-n, measured."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint.describe import describe
from ..errors import ConfigError, VerificationError
from ..quantize.stdlib_text import load_pairs
from ..verify.merge import verify_merge
from .embedded import base_model_path
from .evaluate import MAX_LENGTH, held_out_loss, row_text
from .user_data import load_rows

_CALIBRATION_SAMPLES = 128
_EVALUATION_ROWS = 400


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a quickstart, as `qalora quickstart` takes them.

    Args:
        out: directory that everything is written to; must not exist.
        model: name or directory of a 16-bit causal LM; None for the embedded one.
        dataset: .jsonl or .txt file; None for pairs cut from the standard library.
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale and an offset.
        offsets_at: which weight of a group fp16 holds: "minimum" (as llama.cpp) or "middle".
        rank: of the adapter; lora_alpha is twice that.
        learning_rate: peak, AdamW with a cosine schedule.
        steps: optimizer steps.
        batch_size: rows a step.
        seed: of calibration, adapter and data order.

    Raises:
        ConfigError: a number is out of range.
    """

    out: Path
    model: str | None = None
    dataset: Path | None = None
    bits: int = 4
    group_size: int = 32
    offsets_at: Literal["middle", "minimum"] = "minimum"
    rank: int = 16
    learning_rate: float = 3e-3
    steps: int = 160
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ConfigError(f"--{option}: expected 1 or more, found {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ConfigError(f"--learning-rate: expected above 0, found {self.learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed: expected 0 to 2**32 - 1, found {self.seed}")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result table; sizes in bytes, loss in nats a token."""

    name: str
    loss: float
    size: int
    bits_per_weight: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of a quickstart, and where it wrote everything."""

    rows: list[Row]
    merged_equals_unmerged: bool
    verified_layers: int
    prompt: str
    before: str
    after: str
    paths: dict[str, str]
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class _Job:
    """Everything that is known before the first model is loaded: data, tokenizer, directories."""

    settings: Settings
    source: Path
    tokenizer: Any
    training: list[dict[str, str]]
    held_out: list[dict[str, str]]
    windows: torch.Tensor
    """int64 [samples, MAX_LENGTH], to calibrate GPTQ on."""
    paths: dict[str, Path]

    @property
    def prompt(self) -> str:
        """The start of the first held-out row, which the models continue."""
        return self.held_out[0].get("prompt") or self.held_out[0]["text"][:200]

    def load(self, path: Path) -> Any:
        """Return the model in `path`, on the GPU if there is one."""
        from transformers import AutoModelForCausalLM

        gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if gpu else torch.float32
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        return model.to("cuda" if gpu else "cpu").eval()

    def measure(self, name: str, model: Any, *directories: Path) -> Row:
        """Return the line of a model; an adapter's directory comes after that of its base."""
        loss = held_out_loss(model, self.tokenizer, self.held_out)
        files = [file for path in directories for file in path.glob("*.safetensors")]
        size = sum(file.stat().st_size for file in files)
        bits = describe(directories[0], quick=True).get("bits_per_weight", 16.0)
        return Row(name, loss, size, bits)


def run(settings: Settings, say: Callable[[str], None] = print) -> Result:
    """Quantize, train, merge, verify, and measure each stage on held-out rows.

    Args:
        settings: see `Settings`.
        say: takes one line of progress at a time.

    Raises:
        ConfigError: bad settings, before anything is written.
        CheckpointError: the model is quantized already, incomplete or damaged; likewise.
        QuantizationError: too little text to calibrate on; likewise.
        VerificationError: the merged model is not what was trained.
    """
    job = _prepare(settings)
    paths, width = job.paths, f"INT{settings.bits}"

    say(f"base: {job.source} ({len(job.training)} training rows, {len(job.held_out)} held out)")
    rows = [job.measure("16-bit base", job.load(job.source), job.source)]

    say(f"quantizing to {width}, groups of {settings.group_size}, GPTQ ...")
    started = time.monotonic()
    _quantize(job)
    seconds = {"quantize": time.monotonic() - started}
    model = job.load(paths["base-int"])
    before = _generate(model, job.tokenizer, job.prompt)
    rows.append(job.measure(f"{width} base", model, paths["base-int"]))

    say(f"training a QA-LoRA adapter of rank {settings.rank}, {settings.steps} steps ...")
    started = time.monotonic()
    trained = _train(job, model)
    seconds["train"] = time.monotonic() - started
    rows.append(job.measure(f"{width} + adapter", trained, paths["base-int"], paths["adapter"]))

    say("verifying the merged checkpoint ...")
    report = verify_merge(paths["merged"], paths["adapter"], paths["base-int"])
    merged = job.load(paths["merged"])
    rows.append(job.measure("merged", merged, paths["merged"]))
    return Result(
        rows=rows,
        merged_equals_unmerged=_check_logits(job, merged, trained),
        verified_layers=report.layers,
        prompt=job.prompt,
        before=before,
        after=_generate(merged, job.tokenizer, job.prompt),
        paths={name: str(path) for name, path in paths.items()},
        seconds=seconds,
    )


def _prepare(settings: Settings) -> _Job:
    """Read the data and check the settings; nothing is written, and no model is loaded."""
    from transformers import AutoTokenizer

    from ..files.hub import resolve_model_dir
    from ..quantize.calibration import calibration_windows

    if settings.out.exists():
        raise ConfigError(f"{settings.out}: exists already; give another directory with --out")
    if settings.dataset is None:
        training, held_out = load_pairs("train"), load_pairs("eval")
    else:
        training, held_out = load_rows(settings.dataset)
    source = base_model_path() if settings.model is None else resolve_model_dir(settings.model)
    _check_model(source, settings)
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = calibration_windows(
        [row_text(row) for row in training],
        tokenizer,
        samples=_CALIBRATION_SAMPLES,
        seq_len=MAX_LENGTH,
        seed=settings.seed,
    )
    paths = {"base-int": settings.out / f"base-int{settings.bits}"}
    paths |= {name: settings.out / name for name in ("training", "adapter", "merged")}
    held_out = held_out[:_EVALUATION_ROWS]
    return _Job(settings, source, tokenizer, training, held_out, windows, paths)


def _check_model(source: Path, settings: Settings) -> None:
    """Refuse at once what quantizing would refuse when the 16-bit model has been measured."""
    from ..checkpoint.config import QALoRAQuantConfig
    from ..quantize.calibration import fitting_length
    from ..quantize.source import ModelSource, choose_layers

    config = QALoRAQuantConfig(
        settings.bits, settings.group_size, method="gptq", offsets_at=settings.offsets_at
    )
    model = ModelSource(source)
    choose_layers(model, config)
    limit = fitting_length(model.model.config, None)
    if limit < MAX_LENGTH:
        raise ConfigError(
            f"{source}: takes {limit} tokens; the quickstart works on rows of {MAX_LENGTH}. Use a "
            "model that takes them, or the commands one by one (qalora quantize --help)"
        )


def _quantize(job: _Job) -> None:
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
        samples=_CALIBRATION_SAMPLES,
        seq_len=MAX_LENGTH,
        seed=settings.seed,
    )


def _train(job: _Job, model: Any) -> Any:
    """Train with an SFTTrainer as a user writes it; return the model, adapter and merge written."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ..training.callback import MergeCallback
    from ..tuner import QALoRAConfig

    settings, gpu = job.settings, torch.cuda.is_available()
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
        callbacks=[MergeCallback(job.paths["merged"])],
    )
    trainer.train()
    trainer.save_model(str(job.paths["adapter"]))
    return trainer.model.eval()


@torch.no_grad()
def _check_logits(job: _Job, merged: Any, trained: Any) -> bool:
    """Return True; raise VerificationError where the two models compute different logits."""
    ids = job.tokenizer(row_text(job.held_out[0]), return_tensors="pt")["input_ids"]
    ids = ids[:, :MAX_LENGTH].to(merged.device)
    if not torch.equal(merged(input_ids=ids).logits, trained(input_ids=ids).logits):
        raise VerificationError(f"{job.paths['merged']}: logits differ from the trained model's")
    return True


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 96) -> str:
    """Return the greedy continuation of a prompt, with repetitions penalised."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = ids[:, -MAX_LENGTH + new_tokens :].to(model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
