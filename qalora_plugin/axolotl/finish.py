"""After training: the merged checkpoint beside the adapter, and on the Hub if asked."""

import logging
from pathlib import Path
from typing import Any

from ..checkpoint.reader import read_json
from ..errors import OutputError
from ..hub import push_merged
from ..merge import merge_adapter

LOG = logging.getLogger(__name__)
MERGED_DIR = "merged"
_NEVER_PUSH = ("none", "no", None)


def merged_dir(cfg: Any) -> Path:
    """Where the merged checkpoint of a run goes: `output_dir/merged`."""
    return Path(cfg["output_dir"]).expanduser() / MERGED_DIR


def check_free(cfg: Any) -> None:
    """Refuse to train towards a merge that has no place.

    Raises:
        OutputError: output_dir/merged is there already.
    """
    merged = merged_dir(cfg)
    if cfg.qalora["merge_on_finish"] and merged.is_dir() and any(merged.iterdir()):
        raise OutputError(
            f"{merged}: an earlier run has written it, and nothing is overwritten. Choose another "
            "output_dir, move it away, or set `qalora: {merge_on_finish: false}`"
        )


def merge_and_push(cfg: Any) -> None:
    """Merge the adapter in output_dir into its base; one process calls this.

    Raises:
        QALoRAError: the merge or the push failed; the adapter stays where it is.
    """
    adapter = Path(cfg["output_dir"]).expanduser()
    result = merge_adapter(adapter, merged_dir(cfg))
    LOG.info("qalora: merged %d layers into %s", result.layers, result.out)
    repo_id = cfg.get("hub_model_id")
    if repo_id and cfg.get("hub_strategy") not in _NEVER_PUSH:
        # the trainer pushes the adapter to hub_model_id itself
        address = push_merged(
            result.out,
            f"{repo_id}-merged",
            data=", ".join(str(entry["path"]) for entry in cfg.get("datasets") or []),
            log_history=_log_history(adapter),
        )
        LOG.info("qalora: pushed the merged model to %s", address)


def _log_history(output_dir: Path) -> list[dict[str, Any]]:
    """The trainer's log of the newest checkpoint, empty where none was saved."""
    states = sorted(
        output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime
    )
    return read_json(states[-1]).get("log_history", []) if states else []
