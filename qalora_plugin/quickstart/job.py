"""Everything that a quickstart knows before the first model is loaded: data, tokenizer, paths."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from ..checkpoint.describe import describe
from ..checkpoint.side_files import load_tokenizer
from ..errors import ConfigError
from ..quantize.calibration import special_tokens
from ..quantize.stdlib_text import load_docstrings, load_pairs
from .embedded import base_model_path
from .evaluate import MAX_LENGTH, held_out_loss, row_text
from .settings import EMBEDDED, SMOLLM2, Settings
from .smollm2 import find_smollm2
from .user_data import load_rows

CALIBRATION_SAMPLES = 128
_EVALUATION_ROWS = {True: 48, False: 400}
"""Held-out rows that are judged, of a GGUF file and of a 16-bit model."""
_TASK = "Write the one-line docstring of this Python function."
_SAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the result table; sizes in bytes, loss in nats a token (None: not measured)."""

    name: str
    loss: float | None
    size: int
    bits_per_weight: float


@dataclasses.dataclass(frozen=True)
class Job:
    """A quickstart that has been checked.

    Args:
        settings: what was asked for.
        source: directory of the base, 16-bit or imported from a GGUF file.
        file: that GGUF file, or None.
        tokenizer: of the base.
        training: rows {"prompt", "completion"} or {"text"}.
        held_out: the same, never trained on.
        samples: held-out rows whose answers are shown; `prompt` is as a person writes it.
        windows: int64 [samples, MAX_LENGTH], to calibrate GPTQ on; None for a GGUF file.
        paths: by name, what is written.
    """

    settings: Settings
    source: Path
    file: Path | None
    tokenizer: Any
    training: list[dict[str, str]]
    held_out: list[dict[str, str]]
    samples: list[dict[str, str]]
    windows: torch.Tensor | None
    paths: dict[str, Path]

    @property
    def base(self) -> Path:
        """The directory of the INT-n base."""
        return self.source if self.file else self.paths["base-int"]

    def load(self, path: Path) -> Any:
        """Return the model in `path`, on the GPU if there is one."""
        from transformers import AutoModelForCausalLM

        gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if gpu else torch.float32
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=False)
        return model.to("cuda" if gpu else "cpu").eval()

    def measure(self, name: str, model: Any | None, *paths: Path) -> Row:
        """Return the line of a model, None for one whose loss is not measured.

        `paths` are files or directories; an adapter's comes after that of its base.
        """
        loss = None if model is None else held_out_loss(model, self.tokenizer, self.held_out)
        size = sum(file.stat().st_size for path in paths for file in _weight_files(path))
        bits = describe(paths[0], quick=True).get("bits_per_weight", 16.0)
        return Row(name, loss, size, bits)


def prepare(settings: Settings) -> Job:
    """Read the data and check the settings; no model is loaded, and `settings.out` not written.

    Raises:
        ConfigError: bad settings, or a file that is not there.
        CheckpointError: the model is quantized already, incomplete or damaged.
        QuantizationError: too little text to calibrate on.
    """
    if settings.out.exists():
        raise ConfigError(f"{settings.out}: exists already; give another directory with --out")
    file = _gguf_file(settings)
    training, held_out = _load_data(settings)
    source = _base_directory(settings, file)
    tokenizer = load_tokenizer(source)
    samples = [_sample(row) for row in held_out[:_SAMPLES]]
    paths = {name: settings.out / name for name in ("training", "adapter", "merged")}
    windows = None
    if file is None:
        paths = {"base-int": settings.out / f"base-int{settings.bits}"} | paths
        windows = _windows(training, tokenizer, settings.seed)
    else:
        paths |= {"gguf": settings.out / "merged-original.gguf"}
        task = None if settings.dataset else _TASK
        training = [_chat(row, tokenizer, task) for row in training]
        held_out = [_chat(row, tokenizer, task) for row in held_out]
    held_out = held_out[: _EVALUATION_ROWS[settings.is_gguf]]
    return Job(settings, source, file, tokenizer, training, held_out, samples, windows, paths)


def _gguf_file(settings: Settings) -> Path | None:
    if not settings.is_gguf:
        return None
    file = find_smollm2() if settings.model == SMOLLM2 else Path(settings.model)
    if not file.is_file():
        raise ConfigError(f"--model: expected a GGUF file, found no file {file}")
    return file


def _base_directory(settings: Settings, file: Path | None) -> Path:
    """Return the directory of the base, which is checked first."""
    from ..checkpoint.convert import cached_import
    from ..files.hub import resolve_model_dir

    if file is not None:
        return cached_import(file)
    embedded = settings.model == EMBEDDED
    source = base_model_path() if embedded else resolve_model_dir(str(settings.model))
    _check_model(source, settings)
    return source


def _load_data(settings: Settings) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    if settings.dataset is not None:
        return load_rows(settings.dataset)
    load = load_docstrings if settings.is_gguf else load_pairs
    return load("train"), load("eval")


def _windows(rows: list[dict[str, str]], tokenizer: Any, seed: int) -> torch.Tensor:
    from ..quantize.calibration import calibration_windows

    texts = [row_text(row) for row in rows]
    return calibration_windows(
        texts, tokenizer, samples=CALIBRATION_SAMPLES, seq_len=MAX_LENGTH, seed=seed
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


def _chat(row: dict[str, str], tokenizer: Any, task: str | None) -> dict[str, str]:
    """Put a prompt into the model's chat template, if it has one; `task` is the system's message.

    A template without a system role, such as Gemma's, gets the task before the prompt.
    What a template writes at the very start and the tokenizer adds to every text is left to it.
    """
    if "text" in row or not tokenizer.chat_template:
        return row
    asked = {"role": "user", "content": row["prompt"].rstrip("\n")}
    messages = [{"role": "system", "content": task}, asked] if task else [asked]
    settings = {"tokenize": False, "add_generation_prompt": True}
    try:
        prompt = tokenizer.apply_chat_template(messages, **settings)
    except TemplateError:
        if not task:
            raise
        asked["content"] = f"{task}\n\n{asked['content']}"
        prompt = tokenizer.apply_chat_template([asked], **settings)
    start = tokenizer.decode(special_tokens(tokenizer)[0])
    return row | {"prompt": prompt.removeprefix(start)}


def _sample(row: dict[str, str]) -> dict[str, str]:
    """Return the prompt that is shown and its expected answer, of which texts have none."""
    return {"prompt": row.get("prompt") or row["text"][:200], "expected": row.get("completion", "")}


def _weight_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))
