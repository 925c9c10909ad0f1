"""Model cards of quantized models and of their exports: what they hold, and how exactly."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError  # type: ignore[import-untyped]

from qalora_kernels.stored import QUANT_METHOD

from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..checkpoint.format import Engine, format_named
from ..checkpoint.kind import find_kind
from ..errors import CheckpointError, OutputError, QALoRAError
from ..files.hub import hub_failures, public_name
from ..files.inside import check_inside, check_regular
from ..files.json import read_json
from ..files.names import RECORD_FILE, REPORT_FILE
from ..files.schemas import QuantizationReport, read_as
from ..formats.record import describe_source, read_record

HUB_FAILURES = hub_failures()
_UNREADABLE: tuple[type[Exception], ...] = (*HUB_FAILURES, ValueError, YAMLError)

_EXACT_MERGE = (
    "Merging was exact: the integers are the quantized base's, and the fine-tuning is in the "
    "offsets{scales}. This is the model that was trained."
)
_BASE = "This is the quantized base, to train adapters on; it was not fine-tuned."
_OUR_USAGE = """**Needs the `qalora_plugin` package.** Without it transformers refuses to load it.

```python
import qalora_plugin  # the package qalora-plugin
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```"""
_TUNED = " and fine-tuned with [QA-LoRA](https://arxiv.org/abs/2309.14717)"
_TEXT = """# {title}

{base}, quantized to INT{bits} (groups of {group_size}){mixed}{tuned}.

{exactness}

{usage}

| | |
|---|---|
{rows}
"""


_OUR_ENGINES = (
    Engine(
        "transformers with qalora_plugin",
        "exactly",
        "",
        "integration/newest/test_newest.py::test_the_fast_suite_passes_on_the_newest_releases",
    ),
    Engine(
        "vLLM 0.32.0, CPU, with qalora_plugin",
        "exactly",
        "",
        "integration/vllm/test_vllm.py::test_vllm_computes_what_transformers_computes",
    ),
    Engine(
        "transformers without it",
        "not",
        "refused",
        "integration/guard/test_without_plugin.py::test_stock_transformers_refuses",
    ),
    Engine(
        "vLLM 0.32.0 without it",
        "not",
        "refused",
        "integration/vllm/test_vllm.py::test_without_the_plugin_vllm_refuses",
    ),
)


def engines_of(format: str) -> tuple[Engine, ...]:
    """Return what engines do with a format, ours included."""
    return _OUR_ENGINES if format == QUANT_METHOD else format_named(format).engines


def usage_of(format: str, path: Path) -> str:
    """Return how a model in a format is loaded from this machine: commands, or Python."""
    usage = _OUR_USAGE if format == QUANT_METHOD else format_named(format).usage
    blocks = re.findall(r"```\w*\n(.*?)```", usage, flags=re.DOTALL)
    text = "".join(blocks).format(repo_id=path, file=path)
    return "".join(line for line in text.splitlines(True) if not line.startswith("hf download"))


@dataclass
class Subject:
    """The subject of a model card: a directory of ours, or an export.

    Args:
        path: the directory, or a file.
        format: "qalora", or the name of the export's format.
        facts: as `formats.record` has them of its source.
        exactness: how exactly it holds what was trained.
        measured: rows of figures, {title: value}.
    """

    path: Path
    format: str
    facts: dict[str, Any]
    exactness: str
    measured: dict[str, str] = field(default_factory=dict)

    @property
    def tuned(self) -> bool:
        """True if it is an adapter, or an adapter is merged into it."""
        return bool(self.facts.get("fine_tuned", "r" in self.facts))  # older records have r alone

    @property
    def base(self) -> str:
        """Name of the base, "" if it is not known."""
        return public_name(self.facts.get("base"))  # again: older records have relative paths

    @property
    def hub_base(self) -> str | None:
        """Name of the base, if it is one on the Hub."""
        return self.base if "/" in self.base else None

    def files(self) -> dict[str, Path]:
        """Return what is uploaded, {path in the repository: file}; hidden files are not.

        Raises:
            CheckpointError: a link leads out of the directory, or there is a pipe or a device.
        """
        if self.path.is_file():
            return {self.path.name: self.path}
        found = {str(path.relative_to(self.path)): path for path in sorted(self.path.rglob("*"))}
        chosen = {}
        for name, path in found.items():
            if any(part.startswith(".") for part in Path(name).parts):
                continue
            check_inside(path, self.path)
            if not path.is_dir():
                check_regular(path, self.path)
                chosen[name] = path
        return chosen


def read_log_history(path: Path) -> list[dict[str, Any]]:
    """Read the log of a training from the trainer_state.json that the Trainer saved.

    Raises:
        CheckpointError: it is none.
    """
    advice = "Expected the trainer_state.json of a checkpoint-N that the Trainer saved"
    try:
        history = read_json(path).get("log_history")
    except CheckpointError as error:
        raise CheckpointError(f"{error} {advice}.") from error
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise CheckpointError(f"{path}: no list `log_history`. {advice}.")
    return history


def find_subject(path: str | Path) -> Subject:
    """Return what a directory or file is.

    Raises:
        OutputError: it is neither a checkpoint in our format nor an export.
        CheckpointError: it is damaged.
    """
    path = Path(path).expanduser().resolve()
    record = read_record(path)
    if record is not None:
        measured = _loss_rows(path, record.get("measured"))
        return Subject(path, record["format"], record["source"], record["exactness"], measured)
    try:
        checkpoint = open_quantized(path)
        if checkpoint.is_foreign:
            raise OutputError(f"It is a model in format {checkpoint.format}.")
    except QALoRAError as error:
        if path.is_dir() and find_kind(path).method == QUANT_METHOD:
            raise OutputError(str(error)) from error  # it is ours, and damaged
        raise OutputError(
            f"{path}: is neither a model in qalora's format nor an export by `qalora export` (no "
            f"{RECORD_FILE}). {error}"
        ) from error
    return subject_of(checkpoint)


def subject_of(checkpoint: QuantizedCheckpoint) -> Subject:
    """Return the subject that is a merged checkpoint, or a quantized base."""
    facts = describe_source(checkpoint)
    scales = "" if facts.get("adapt") == "zeros" else " and scales"
    return Subject(
        checkpoint.directory,
        QUANT_METHOD,
        facts,
        _EXACT_MERGE.format(scales=scales) if checkpoint.config.merged else _BASE,
        _layer_errors(checkpoint.directory),
    )


def _loss_rows(path: Path, measured: dict[str, Any] | None) -> dict[str, str]:
    """Return rows of a `formats.requantize.Loss`, none if nothing was measured."""
    if not measured:
        return {}
    missing = {"tokens", "exact", "requantized", "divergence"} - measured.keys()
    if missing:
        raise CheckpointError(
            f"{path}: measured.{min(missing)} is missing in {RECORD_FILE}. Export again."
        )
    where = f"nats a token, {measured['tokens']} held-out tokens"
    return {
        "loss of the exact model": f"{measured['exact']:.4f} ({where})",
        "loss of this model": f"{measured['requantized']:.4f} ({where})",
        "KL divergence from the exact model": f"{measured['divergence']:.2e} ({where})",
    }


def _layer_errors(directory: Path) -> dict[str, str]:
    """Return a row of the quantization report, if the directory has one."""
    path = directory / REPORT_FILE
    layers = read_as(path, QuantizationReport)["layers"].values() if path.exists() else []
    errors = [layer["error"] for layer in layers if layer.get("error") is not None]
    if not errors:
        return {}
    mean = sum(errors) / len(errors)
    return {"quantization error of a layer's output": f"{mean:.2e} (mean, relative, squared)"}


def _training_losses(log_history: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return rows of the last training and evaluation loss that a Trainer logged."""
    found = {}
    for title, key in (("training loss", "loss"), ("evaluation loss", "eval_loss")):
        values = [entry for entry in log_history if isinstance(entry.get(key), int | float)]
        if values:
            found[title] = f"{values[-1][key]:.4f} (step {values[-1].get('step')})"
    return found


def make_card(
    subject: Subject,
    repo_id: str,
    data: str | None = None,
    log_history: Sequence[dict[str, Any]] = (),
    *,
    online: bool = True,
) -> ModelCard:
    """Make the model card of what is pushed.

    Args:
        subject: what is pushed.
        repo_id: where to.
        data: name of the training data.
        log_history: the Trainer's, for the losses.
        online: ask the Hub for the base's licence, if the base is there.
    """
    facts, ours = subject.facts, subject.format == QUANT_METHOD
    usage = _OUR_USAGE if ours else format_named(subject.format).usage
    rows = _rows(subject, data) | _training_losses(log_history) | subject.measured
    text = _TEXT.format(
        title=repo_id.rpartition("/")[2],
        base=f"`{subject.base}`" if subject.base else "A base model",
        bits=facts.get("bits", "-n"),
        group_size=facts.get("group_size"),
        mixed=", some layers otherwise" if facts.get("mixed") else "",
        tuned=_TUNED if subject.tuned else ", not fine-tuned",
        exactness=subject.exactness,
        usage=usage.format(repo_id=repo_id, file=subject.path.name),
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None),
    )
    return ModelCard(f"---\n{_metadata(subject, online).to_yaml()}\n---\n\n{text}")


def _rows(subject: Subject, data: str | None) -> dict[str, Any]:
    """Return the card's table; what is not known is None."""
    facts, base = subject.facts, subject.hub_base
    size = sum(path.stat().st_size for path in subject.files().values())
    return {
        "base": f"[{base}](https://huggingface.co/{base})" if base else subject.base or "unknown",
        "format": subject.format,
        "bits": facts.get("bits"),
        "group size": facts.get("group_size"),
        "other layers": "some have other bits or groups" if facts.get("mixed") else None,
        "engines": "; ".join(engine.as_text() for engine in engines_of(subject.format)) or None,
        "quantized with": facts.get("method"),
        "adapted": facts.get("adapt"),
        "rank": facts.get("r"),
        "lora_alpha": facts.get("lora_alpha"),
        "adapted layers": facts.get("layers"),
        "training data": (data or "not recorded") if subject.tuned else None,
        "size": f"{size / 1e6:.1f} MB",
    }


def _metadata(subject: Subject, online: bool) -> ModelCardData:
    facts, base = subject.facts, subject.hub_base
    tags = ["qalora", "qa-lora", f"int{facts['bits']}"] if "bits" in facts else ["qalora"]
    library, relation = "transformers", "quantized"
    if subject.format != QUANT_METHOD:
        format = format_named(subject.format)
        library = format.hub_library
        if format.of_adapter:
            relation = "adapter"
        else:
            tags.append(format.name)
    licence = facts.get("licence") or (_licence_on_hub(base) if base and online else None)
    if not licence and subject.path.is_dir() and any(subject.path.glob("LICENSE*")):
        licence = "other"
    return ModelCardData(
        library_name=library,
        base_model=base,
        base_model_relation=relation if base else None,
        license=licence,
        tags=tags,
    )


def _licence_on_hub(base: str) -> str | None:
    """Return the licence that the base's card on the Hub names, if it can be read."""
    try:
        return ModelCard.load(base).data.license
    except _UNREADABLE:
        return None
