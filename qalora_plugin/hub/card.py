"""Model cards of quantized models and of their exports: what they hold, and how exactly."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..errors import OutputError, QALoRAError
from ..files.json import read_json
from ..files.names import RECORD_FILE, REPORT_FILE
from ..formats.record import GGUF_KEY, describe_source, public_name, read_record
from ..formats.walk import require

CARD_FILE = "README.md"
# what connections raise comes from httpx, or from httpx2 with huggingface_hub 2
_HTTP_ERROR = cast(
    type[Exception], next(b for b in HfHubHTTPError.__mro__ if b.__name__ == "HTTPError")
)
# huggingface_hub 1.17 retries on a client that it has closed, a RuntimeError
HUB_FAILURES = (HfHubHTTPError, _HTTP_ERROR, HFValidationError, OSError, RuntimeError)
MERGED = "qalora"

_EXACT_MERGE = (
    "Merging was exact: the integers are the quantized base's, and the fine-tuning is in the "
    "offsets{scales}. This is the model that was trained."
)
_BASE = "This is the quantized base, to train adapters on; it was not fine-tuned."
# how a format is loaded: library_name of the Hub, and code
_USE = {
    MERGED: (
        "transformers",
        """**Needs the `qalora_plugin` package.** Without it transformers refuses to load it.

```python
import qalora_plugin  # pip install qalora-plugin
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```""",
    ),
    "torchao": (
        "transformers",
        """```python
from transformers import pipeline  # pip install transformers torchao

print(pipeline("text-generation", "{repo_id}")("Once upon a time")[0])
```""",
    ),
    "mlx": (
        "mlx",
        """```
pip install mlx-lm
mlx_lm.generate --model {repo_id} --ignore-chat-template --prompt "Once upon a time"
```""",
    ),
    "onnx": (
        "onnxruntime",
        """```python
import onnxruntime_genai as og  # pip install onnxruntime-genai huggingface_hub
from huggingface_hub import snapshot_download

model = og.Model(snapshot_download("{repo_id}"))
```""",
    ),
    "gguf": (
        "gguf",
        """```
hf download {repo_id} {file} --local-dir .
llama-cli -m {file} -p "Once upon a time"
```""",
    ),
    "gptq": (
        "transformers",
        """```python
from gptqmodel import GPTQModel  # pip install gptqmodel

model = GPTQModel.load("{repo_id}")
```""",
    ),
    "lora": (
        "peft",
        """```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{repo_id}")  # base: the quantized base named above
```""",
    ),
}


@dataclass
class Subject:
    """What is to be pushed.

    Args:
        path: the directory, or a GGUF file.
        format: `MERGED`, or one of `export.FORMATS`.
        facts: base, licence, bits, group_size, method, adapt, r, ... as known.
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
        """Whether an adapter is in it, or it is one."""
        return bool(self.facts.get("fine_tuned", "r" in self.facts))  # older records have r alone

    def files(self) -> dict[str, Path]:
        """What is uploaded, {path in the repository: file}; hidden files are not."""
        if self.path.is_file():
            return {self.path.name: self.path}
        found = {str(path.relative_to(self.path)): path for path in sorted(self.path.rglob("*"))}
        return {
            name: path
            for name, path in found.items()
            if path.is_file() and not any(part.startswith(".") for part in Path(name).parts)
        }


def find_subject(path: str | Path) -> Subject:
    """Look at a directory or GGUF file.

    Raises:
        OutputError: it is neither a checkpoint in our format nor an export.
    """
    path = Path(path).expanduser().resolve()
    if path.is_file() and path.suffix == ".gguf":
        return _gguf(path)
    record = read_record(path) if path.is_dir() else None
    if record is not None:
        measured = record.get("measured") or {}
        return Subject(
            path,
            record["format"],
            record["source"],
            record["exactness"],
            _loss_rows(measured) if measured else {},
        )
    try:
        checkpoint = open_quantized(path)
    except QALoRAError as error:
        raise _no_subject(path, str(error)) from error
    if checkpoint.is_foreign:
        raise _no_subject(path, "It is a stock GPTQ model.")
    return subject_of(checkpoint)


def subject_of(checkpoint: QuantizedCheckpoint) -> Subject:
    """A merged checkpoint, or a quantized base."""
    facts = describe_source(checkpoint)
    scales = "" if facts.get("adapt") == "zeros" else " and scales"
    return Subject(
        checkpoint.directory,
        MERGED,
        facts,
        _EXACT_MERGE.format(scales=scales) if checkpoint.config.merged else _BASE,
        _layer_errors(checkpoint.directory),
    )


def _no_subject(path: Path, what: str) -> OutputError:
    return OutputError(
        f"{path}: is neither a model in qalora's format nor an export by `qalora export` (no "
        f"{RECORD_FILE}). {what}"
    )


def _gguf(path: Path) -> Subject:
    try:
        reader = require("gguf", "gguf").GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise OutputError(f"{path}: cannot be read as GGUF ({error}).") from error
    if GGUF_KEY not in reader.fields:
        raise _no_subject(path, f"It has no {GGUF_KEY}.")
    kinds = [tensor.tensor_type.name for tensor in reader.tensors]
    facts = json.loads(reader.fields[GGUF_KEY].contents())
    if "Q4_1" in kinds:
        measured = facts.pop("exactness", "Integers and scales are exact, minima rounded to f16.")
        exactness = f"{kinds.count('Q4_1')} matrices are Q4_1. {measured}"
    elif "F16" in kinds:
        exactness = "Layers are F16, rounded from fp32."
    else:
        exactness = "Exact to the rounding of fp32, in which everything is stored."
    return Subject(path, "gguf", facts, exactness)


def _loss_rows(measured: dict[str, Any]) -> dict[str, str]:
    """Rows of `export.requantize.Loss`."""
    where = f"nats a token, {measured['tokens']} held-out tokens"
    return {
        "loss of the exact model": f"{measured['exact']:.4f} ({where})",
        "loss of this model": f"{measured['requantized']:.4f} ({where})",
        "KL divergence from the exact model": f"{measured['divergence']:.2e} ({where})",
    }


def _layer_errors(directory: Path) -> dict[str, str]:
    """Of the quantization report, where the directory has one."""
    path = directory / REPORT_FILE
    layers = read_json(path)["layers"].values() if path.exists() else []
    errors = [layer["error"] for layer in layers if layer.get("error") is not None]
    if not errors:
        return {}
    mean = sum(errors) / len(errors)
    return {"quantization error of a layer's output": f"{mean:.2e} (mean, relative, squared)"}


def training_losses(log_history: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The last training and evaluation loss of a Trainer's `log_history`, where there are any."""
    found = {}
    for title, key in (("training loss", "loss"), ("evaluation loss", "eval_loss")):
        values = [entry for entry in log_history if key in entry]
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
    """The card.

    Args:
        subject: what is pushed.
        repo_id: where to.
        data: name of the training data.
        log_history: the Trainer's, for the losses.
        online: ask the Hub for the base's licence, if the base is there.
    """
    facts = subject.facts
    base = public_name(facts.get("base"))  # again: older records have relative paths
    on_hub = "/" in base
    size = sum(path.stat().st_size for path in subject.files().values())
    rows = {
        "base": f"[{base}](https://huggingface.co/{base})" if on_hub else base or "unknown",
        "format": subject.format,
        "bits": facts.get("bits"),
        "group size": facts.get("group_size"),
        "quantized with": facts.get("method"),
        "adapted": facts.get("adapt"),
        "rank": facts.get("r"),
        "lora_alpha": facts.get("lora_alpha"),
        "adapted layers": facts.get("layers"),
        "training data": (data or "not recorded") if subject.tuned else None,
        "size": f"{size / 1e6:.1f} MB",
        **training_losses(log_history),
        **subject.measured,
    }
    library, use = _USE[subject.format]
    licence = facts.get("licence") or (_licence_on_hub(base) if on_hub and online else None)
    tags = ["qalora", "qa-lora", f"int{facts['bits']}"] if "bits" in facts else ["qalora"]
    card_data = ModelCardData(
        library_name=library,
        base_model=base if on_hub else None,
        base_model_relation=("adapter" if subject.format == "lora" else "quantized")
        if on_hub
        else None,
        license=licence or ("other" if _has_licence_file(subject.path) else None),
        tags=tags if subject.format in (MERGED, "lora") else [*tags, subject.format],
    )
    name = f"`{base}`" if base else "A base model"
    tuned = " and fine-tuned with [QA-LoRA](https://arxiv.org/abs/2309.14717)"
    text = f"""# {repo_id.rpartition("/")[2]}

{name}, quantized to INT{facts.get("bits", "-n")} (groups of {facts.get("group_size")})\
{tuned if subject.tuned else ", not fine-tuned"}.

{subject.exactness}

{use.format(repo_id=repo_id, file=subject.path.name)}

| | |
|---|---|
"""
    text += "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value is not None)
    return ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}\n")


def _has_licence_file(path: Path) -> bool:
    return path.is_dir() and any(path.glob("LICENSE*"))


def _licence_on_hub(base: str) -> str | None:
    """The licence that the base's card on the Hub names, if it can be read."""
    try:
        return ModelCard.load(base).data.license
    except (*HUB_FAILURES, ValueError):
        return None
