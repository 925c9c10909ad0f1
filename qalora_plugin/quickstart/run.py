"""The whole way on one machine: 16-bit base -> INT-n -> QA-LoRA -> merged INT-n, measured."""

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import ConfigError, VerificationError
from ..quantize.stdlib_text import load_pairs
from .embedded import base_model_path
from .evaluate import held_out_loss
from .user_data import load_rows

MAX_LENGTH = 512
_CALIBRATION_SAMPLES = 128
_EVALUATION_ROWS = 400


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `qalora quickstart` takes.

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
    """What a quickstart run measured, and where things lie."""

    rows: list[Row]
    merged_equals_unmerged: bool
    verified_layers: int
    prompt: str
    before: str
    after: str
    paths: dict[str, str]
    seconds: dict[str, float]


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..files.hub import resolve_model_dir
    from ..quantize.calibration import calibration_windows
    from ..quantize.pipeline import quantize_model
    from ..verify.merge import verify_merge

    if settings.out.exists():
        raise ConfigError(f"{settings.out}: exists already; give another directory with --out")
    if settings.dataset is None:
        training, held_out = load_pairs("train"), load_pairs("eval")
    else:
        training, held_out = load_rows(settings.dataset)
    held_out = held_out[:_EVALUATION_ROWS]
    source = base_model_path() if settings.model is None else resolve_model_dir(settings.model)
    _check_model(source, settings)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    paths = {name: settings.out / name for name in ("base-int", "training", "adapter", "merged")}
    paths["base-int"] = settings.out / f"base-int{settings.bits}"
    seconds: dict[str, float] = {}
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = calibration_windows(
        [_as_text(row) for row in training],
        tokenizer,
        samples=_CALIBRATION_SAMPLES,
        seq_len=MAX_LENGTH,
        seed=settings.seed,
    )

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()

    def measure(model: Any) -> float:
        return held_out_loss(model, tokenizer, held_out, max_length=MAX_LENGTH)

    say(f"base: {source} ({len(training)} training rows, {len(held_out)} held out)")
    base = load(source)
    base_row = Row("16-bit base", measure(base), _weights_size(source), 16.0)
    del base

    say(f"quantizing to INT{settings.bits}, groups of {settings.group_size}, GPTQ ...")
    started = time.monotonic()
    quantize_model(
        source,
        paths["base-int"],
        bits=settings.bits,
        group_size=settings.group_size,
        offsets_at=settings.offsets_at,
        method="gptq",
        calibration=windows,
        samples=_CALIBRATION_SAMPLES,
        seq_len=MAX_LENGTH,
        seed=settings.seed,
    )
    seconds["quantize"] = time.monotonic() - started
    model = load(paths["base-int"])
    bits_per_weight = quantized_bits_per_weight(model)
    prompt = held_out[0].get("prompt") or held_out[0]["text"][:200]
    before = _generate(model, tokenizer, prompt)
    quantized_row = Row(
        f"INT{settings.bits} base",
        measure(model),
        _weights_size(paths["base-int"]),
        bits_per_weight,
    )

    say(f"training a QA-LoRA adapter of rank {settings.rank}, {settings.steps} steps ...")
    started = time.monotonic()
    trainer = _train(model, tokenizer, training, settings, paths)
    seconds["train"] = time.monotonic() - started
    trained = trainer.model.eval()
    trainer.save_model(str(paths["adapter"]))
    adapter_size = _weights_size(paths["adapter"])
    adapter_row = Row(
        f"INT{settings.bits} + adapter",
        measure(trained),
        quantized_row.size + adapter_size,
        bits_per_weight,
    )

    say("verifying the merged checkpoint ...")
    report = verify_merge(paths["merged"], paths["adapter"], paths["base-int"])
    merged = load(paths["merged"])
    merged_row = Row(
        "merged", measure(merged), _weights_size(paths["merged"]), quantized_bits_per_weight(merged)
    )
    ids = tokenizer(_as_text(held_out[0]), return_tensors="pt")["input_ids"][:, :MAX_LENGTH]
    with torch.no_grad():
        ids = ids.to(device)
        equal = torch.equal(merged(input_ids=ids).logits, trained(input_ids=ids).logits)
    if not equal:
        raise VerificationError(f"{paths['merged']}: logits differ from the trained model's")
    return Result(
        rows=[base_row, quantized_row, adapter_row, merged_row],
        merged_equals_unmerged=equal,
        verified_layers=report.layers,
        prompt=prompt,
        before=before,
        after=_generate(merged, tokenizer, prompt),
        paths={name: str(path) for name, path in paths.items()},
        seconds=seconds,
    )


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


def _train(
    model: Any,
    tokenizer: Any,
    training: list[dict[str, str]],
    settings: Settings,
    paths: dict[str, Path],
) -> Any:
    """SFTTrainer as a user writes it; the callback writes the merged checkpoint at the end."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from ..training.callback import MergeCallback
    from ..tuner import QALoRAConfig

    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=str(paths["training"]),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 20),
            max_length=MAX_LENGTH,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            logging_steps=max(1, settings.steps // 10),
            save_strategy="no",
            report_to="none",
            seed=settings.seed,
        ),
        train_dataset=Dataset.from_list(training),
        processing_class=tokenizer,
        peft_config=QALoRAConfig(
            r=settings.rank, lora_alpha=2 * settings.rank, seed=settings.seed, task_type="CAUSAL_LM"
        ),
        callbacks=[MergeCallback(paths["merged"])],
    )
    trainer.train()
    return trainer


def quantized_bits_per_weight(model: torch.nn.Module) -> float:
    """Stored bits (integers, scales, offsets, g_idx) a weight of the quantized layers."""
    from ..layers.linear import QuantLinear

    stored = weights = 0
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            spec = layer.spec
            weights += spec.in_features * spec.out_features
            stored += layer.qweight.numel() * 32
            stored += layer.scales.numel() * spec.scales_dtype.itemsize * 8
            stored += layer.offsets.numel() * spec.stored_dtype.itemsize * 8
            stored += 0 if layer.g_idx is None else layer.g_idx.numel() * 32
    return stored / weights


def _weights_size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _as_text(row: dict[str, str]) -> str:
    return row.get("text") or row["prompt"] + row["completion"]


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 96) -> str:
    """Greedy continuation of the prompt; a small base would else repeat itself for ever."""
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    ids = {"input_ids": ids["input_ids"][:, -MAX_LENGTH + new_tokens :].to(model.device)}
    ids["attention_mask"] = torch.ones_like(ids["input_ids"])
    out = model.generate(
        **ids,
        max_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.2,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
