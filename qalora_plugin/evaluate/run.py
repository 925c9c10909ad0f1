"""Run tasks of lm-evaluation-harness on a model of ours, as `lm_eval --model hf` does on others.

The harness computes; here the model is loaded, tasks are named, and its results become rows.
"""

import importlib.metadata
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.convert import cached_import
from ..checkpoint.kind import Kind, find_kind, find_model
from ..checkpoint.side_files import load_tokenizer
from ..errors import CheckpointError, ConfigError
from ..files.hub import locate
from ..files.json import read_json
from ..files.names import ADAPTER_CONFIG_FILE
from ..hf.config import QALoRAQuantConfig
from ..quantize.options import usable_device

SETS = {
    "commonsense": (
        "hellaswag",
        "piqa",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "boolq",
        "openbookqa",
    )
}
"""Names for several tasks, besides the harness's own groups such as `mmlu`.

`commonsense` are the seven of QA-LoRA's paper (arXiv 2309.14717).
"""


@dataclass(frozen=True)
class EvalOptions:
    """How tasks are run; what is not given here is the harness's default.

    Args:
        include: folder with task files (YAML) of one's own, beside the harness's.
        num_fewshot: examples before each question; by default the task's own number.
        limit: rows of each task; by default all.
        batch_size: rows in one forward pass.
        dtype: of the model, a name of torch's or "auto": that of config.json.
        device: "cpu", "cuda" or "cuda:N".
    """

    include: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 8
    dtype: str = "auto"
    device: str = "cpu"


def evaluate(
    model: str | Path,
    tasks: Sequence[str],
    base: str | Path | None = None,
    options: EvalOptions | None = None,
) -> dict[str, Any]:
    """Run tasks on a model, and return their results as JSON-ready rows.

    Args:
        model: directory, Hub id or GGUF file: a merged or quantized model, a 16-bit one, or an
            adapter, which is then run beside its base, not merged.
        tasks: names of tasks and groups of the harness, or of `SETS`.
        base: of an adapter; by default what its config names.
        options: see there.

    Returns:
        {"model", "base", "kind", "versions", "options", "results"}: `results` has a row
        {"task", "metric", "value", "stderr", "fewshot", "rows"} for each metric; of several tasks
        with `acc` the last row is their mean, "task": "average".

    Raises:
        ConfigError: the harness is not installed, a task is unknown, there is a base without an
            adapter, or the device cannot be used.
        CheckpointError: the model cannot be read.
    """
    options = options or EvalOptions()
    directory = _directory(model)
    kind = find_kind(directory)
    _check(kind, directory, base)
    usable_device(options.device)
    harness = _harness()
    manager = harness.tasks.TaskManager(
        include_path=None if options.include is None else str(options.include)
    )
    names = _names(tasks, manager)
    loaded, base_directory = _load(directory, kind, base, options)
    language_model = harness.models.huggingface.HFLM(
        pretrained=loaded,
        tokenizer=load_tokenizer(base_directory or directory),
        batch_size=options.batch_size,
    )
    found = harness.simple_evaluate(
        model=language_model,
        tasks=names,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        task_manager=manager,
        log_samples=False,
    )
    settings = {"num_fewshot": options.num_fewshot, "limit": options.limit}
    return {
        "model": str(directory),
        "base": None if base_directory is None else str(base_directory),
        "kind": _title(kind),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("qalora-plugin", "lm_eval", "transformers", "torch")
        },
        "options": settings | {"dtype": str(loaded.dtype).removeprefix("torch.")},
        "results": rows_of(found),
    }


def _directory(name: str | Path, revision: str | None = None) -> Path:
    """Return where a model or an adapter lies; of one file, the directory of its import."""
    found = find_model(name, revision)
    return cached_import(found) if found.is_file() else found


def _check(kind: Kind, directory: Path, base: str | Path | None) -> None:
    if kind.is_adapter:
        return
    if base is not None:
        raise ConfigError(
            f"--base goes with an adapter, and {directory} is a {_title(kind)} model: leave it out"
        )
    if kind.export is not None:
        raise ConfigError(
            f"{directory}: is an export to {kind.export}, which transformers does not run. "
            "Evaluate the merged model that it was made of"
        )


def _title(kind: Kind) -> str:
    if kind.is_adapter:
        return "adapter"
    return "16-bit" if kind.is_16_bit else "quantized"


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ConfigError(
            f"evaluating needs lm-evaluation-harness ({error}). Install it: pip install "
            "'.[eval]', in a clone of qalora-plugin"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is no string
    return lm_eval


def _names(tasks: Sequence[str], manager: Any) -> list[str]:
    """Return the harness's names of the tasks, those of `SETS` spelled out.

    Raises:
        ConfigError: the harness does not know one of them.
    """
    names = [name for task in tasks for name in SETS.get(task, (task,))]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        raise ConfigError(
            f"--tasks: {', '.join(unknown) or 'none given'}: expected tasks or groups of lm_eval "
            f"{importlib.metadata.version('lm_eval')} (`lm_eval ls tasks` lists them), of the "
            f"folder that --include names, or one of {', '.join(SETS)}"
        )
    return names


def _load(
    directory: Path, kind: Kind, base: str | Path | None, options: EvalOptions
) -> tuple[Any, Path | None]:
    """Return the model in eval mode, and the directory of an adapter's base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    source, base_directory = directory, None
    if kind.is_adapter:
        config = read_json(directory / ADAPTER_CONFIG_FILE)
        named = str(config.get("base_model_name_or_path") or "")
        if not (base or named):
            raise CheckpointError(
                f"{directory / ADAPTER_CONFIG_FILE}: names no base (base_model_name_or_path); "
                "give it with --base DIR"
            )
        if base:
            base_directory = _directory(base)
        else:
            base_directory = _directory(locate(named, directory), config.get("revision"))
        source = base_directory
    settings: dict[str, Any] = {"dtype": options.dtype}
    foreign = find_kind(source).base
    if foreign is not None:
        grid = foreign.module("read").open_checkpoint(source).config
        settings["quantization_config"] = QALoRAQuantConfig(grid.bits, grid.group_size)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=False, **settings)
    if base_directory is not None:
        model = PeftModel.from_pretrained(model, directory)
    return model.to(options.device).eval(), base_directory


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each task and metric of what the harness returned."""
    rows = []
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not chosen:
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if chosen == "none" else f"{metric} ({chosen})",
                    "value": value,
                    "stderr": stderr if isinstance(stderr, int | float) else None,
                    "fewshot": found.get("n-shot", {}).get(task),
                    "rows": found.get("n-samples", {}).get(task, {}).get("effective"),
                }
            )
    groups = found.get("groups", {})
    single = [row for row in rows if row["metric"] == "acc" and row["task"] not in groups]
    if len(single) > 1 and not groups:
        rows.append(_average(single))
    return rows


def _average(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean of tasks, each counted once; its error that of independent tasks."""
    errors = [row["stderr"] for row in rows]
    known = all(error is not None for error in errors)
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(rows) if known else None
    value = statistics.fmean(row["value"] for row in rows)
    counts = [row["rows"] for row in rows]
    total = sum(counts) if all(counts) else None
    return {
        "task": "average",
        "metric": "acc",
        "value": value,
        "stderr": stderr,
        "fewshot": None,
        "rows": total,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows as a table of text."""
    head = ("task", "metric", "value", "stderr", "few-shot", "rows")
    lines = [head]
    for row in rows:
        error = "" if row["stderr"] is None else f"{row['stderr']:.4f}"
        rest = ("" if row[key] is None else str(row[key]) for key in ("fewshot", "rows"))
        lines.append((row["task"], row["metric"], f"{row['value']:.4f}", error, *rest))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in pairs]
        for pairs in (list(enumerate(zip(line, widths, strict=True))) for line in lines)
    )
    return "\n".join("  ".join(cells).rstrip() for cells in padded)
