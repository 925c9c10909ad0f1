"""The end of a run: the merged checkpoint (pushed if asked), and checkpoints to resume from."""

import logging
from pathlib import Path
from typing import Any

from qalora_kernels.stored import QUANT_METHOD

from ..checkpoint.format import Format, format_named
from ..errors import CheckpointError, ConfigError, OutputError, QALoRAError
from ..files.json import read_json
from ..formats.export import check_format, export_model, export_path
from ..hub.push import push_merged
from ..merge.merge import merge_adapter
from ..verify.merge import verify_merge

LOG = logging.getLogger(__name__)
MERGED_DIR = "merged"


def merged_dir(cfg: Any) -> Path:
    """Return where the merged checkpoint of a run goes: `output_dir/merged`."""
    return Path(cfg["output_dir"]).expanduser() / MERGED_DIR


def export_paths(cfg: Any) -> dict[str, Path]:
    """Return where each format of `merge_formats` beside our own goes."""
    names = [name for name in cfg.qalora["merge_formats"] if name != QUANT_METHOD]
    return {name: export_path(merged_dir(cfg), name, cfg.get("base_model")) for name in names}


def check_free(cfg: Any) -> None:
    """Refuse to train towards a merge that has no place.

    Raises:
        OutputError: output_dir/merged, or an export, is there already.
    """
    if not cfg.qalora["merge_on_finish"]:
        return
    for path in (merged_dir(cfg), *export_paths(cfg).values()):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise OutputError(
                f"{path}: an earlier run has written it, and nothing is overwritten. Choose "
                "another output_dir, move it away, or set `qalora: {merge_on_finish: false}`"
            )


def check_formats(cfg: Any, base: str | Path | None) -> None:
    """Refuse to train towards an export that would be refused.

    Args:
        cfg: Axolotl's.
        base: the quantized base; None before a 16-bit model is quantized.

    Raises:
        ConfigError: names the format, and why.
    """
    if not cfg.qalora["merge_on_finish"]:
        return
    for name in export_paths(cfg):
        try:
            if base is not None:
                check_format(base, name, cfg.qalora["adapt"])
            else:
                _check_settings(cfg, format_named(name))
        except QALoRAError as error:
            raise ConfigError(
                f"qalora: merge_formats: {name} could not be written after training: {error}"
            ) from error


def _check_settings(cfg: Any, format: Format) -> None:
    """Refuse a format that cannot hold any base quantized with these settings."""
    format.check_libraries()
    if format.of_source:
        raise ConfigError(
            "the base is quantized in this run, so there is no quantized file to write back to"
        )
    grids = format.grids
    if grids.integer_zeros and cfg.qalora["zero_points"] == "real":
        raise ConfigError("it stores integer zero-points: set zero_points: integer")
    if cfg.qalora["desc_act"] and not grids.act_order and grids.dense_as is None:
        raise ConfigError("it has no act-order: set desc_act: false")


def merge(cfg: Any, adapter: Path) -> None:
    """Merge an adapter into the base it names, to `output_dir/merged`; one process calls this.

    Raises:
        QALoRAError: the merge failed; the adapter stays where it is.
    """
    result = merge_adapter(adapter, merged_dir(cfg))
    LOG.info("qalora: merged %d layers into %s", result.layers, result.out)
    tasks = cfg.get("lm_eval_tasks")
    if tasks:
        names = [task.partition(":")[0] for task in ([tasks] if isinstance(tasks, str) else tasks)]
        LOG.info(
            "qalora: `axolotl lm-eval` loads no plugin, and so not this model: type `qalora eval "
            "%s --tasks %s`",
            result.out,
            ",".join(names),
        )


def merged_before(cfg: Any, adapter: Path) -> str | None:
    """Say in one line that an adapter is merged already; None where nothing is in its place.

    Raises:
        ConfigError: output_dir/merged is there, and is not what base and adapter make.
    """
    merged = merged_dir(cfg)
    if not merged.is_dir() or not any(merged.iterdir()):
        return None
    try:
        report = verify_merge(merged, adapter)
    except QALoRAError as error:
        raise ConfigError(
            f"{merged}: expected no such directory, or this adapter merged, found another result "
            f"({error}). Check it with `qalora verify {merged} --adapter {adapter}`, or move it "
            "away to merge again"
        ) from error
    return (
        f"{merged}: training has merged this adapter already, and all {report.layers} layers are "
        "the same bit for bit: there is nothing to do"
    )


def export(cfg: Any, adapter: Path) -> None:
    """Write the `merge_formats` beside our own; one process calls this, after `merge`.

    Raises:
        OutputError: some could not be written, after all that can be has been.
    """
    failed = []
    for name, path in export_paths(cfg).items():
        try:
            source = adapter if format_named(name).of_adapter else merged_dir(cfg)
            exported = export_model(source, path, name)
            LOG.info("qalora: %s", exported.as_text())
        except QALoRAError as error:
            failed.append(f"{name}: {error}")
    if failed:
        raise OutputError("; ".join(failed))


def push(cfg: Any, merged: Path, log_history: list[dict[str, Any]]) -> None:
    """Push a merged checkpoint to `hub_model_id` + "-merged", if there is a hub_model_id.

    The trainer pushes the adapter to hub_model_id itself, and one repository cannot be both: with
    an adapter beside them, transformers would adapt the merged weights once more.

    Raises:
        OutputError: the Hub refused it.
    """
    if not cfg.get("hub_model_id"):
        return
    data = ", ".join(str(entry["path"]) for entry in cfg.get("datasets") or [])
    address = push_merged(
        merged, f"{cfg['hub_model_id']}-merged", data=data, log_history=log_history
    )
    LOG.info("qalora: pushed the merged model to %s", address)


def drop_torn_checkpoint(cfg: Any) -> None:
    """With `auto_resume_from_checkpoints`, resume from the newest checkpoint that is complete.

    Where none is, training starts over.
    A trainer that is killed while it saves leaves a directory without trainer_state.json, the file
    that it writes last; Axolotl would take that one and fail.
    """
    if not cfg.auto_resume_from_checkpoints or cfg.resume_from_checkpoint:
        return
    paths = Path(cfg.output_dir).expanduser().glob("checkpoint-*")
    steps = [(path.name.rpartition("-")[2], path) for path in paths]
    found = [(int(step), path) for step, path in steps if step.isdigit()]
    complete = [entry for entry in found if _is_complete(entry[1])]
    if complete and max(complete) != max(found):
        cfg["resume_from_checkpoint"] = str(max(complete)[1])
        LOG.warning("qalora: %s is incomplete, resuming from %s", max(found)[1], max(complete)[1])
    elif found and not complete:
        cfg["auto_resume_from_checkpoints"] = False
        LOG.warning("qalora: %s is incomplete and there is no other: starting over", max(found)[1])


def _is_complete(checkpoint: Path) -> bool:
    try:
        return "global_step" in read_json(checkpoint / "trainer_state.json")
    except CheckpointError:
        return False
