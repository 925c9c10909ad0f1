"""Push a merged checkpoint to the Hugging Face Hub, with a model card that says how to load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from .checkpoint.base import QuantizedCheckpoint, open_quantized
from .errors import OutputError

CARD_FILE = "README.md"
# huggingface_hub 1.17 retries on a client that it has closed, a RuntimeError
_FAILURES = (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, RuntimeError)
_TEXT = """# {title}

{base_line} quantized to INT{bits} (groups of {group_size}), fine-tuned with
[QA-LoRA](https://arxiv.org/abs/2309.14717) and merged: the integers are the quantized base's, the
fine-tuning is in the offsets{scales}. Merging was exact: this is the model that was trained.

**Needs the `qalora_plugin` package.** Without it transformers refuses to load the weights.

```python
import qalora_plugin  # pip install qalora-plugin
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
```

| | |
|---|---|
{rows}
"""


def push_merged(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    data: str | None = None,
    log_history: Sequence[dict[str, Any]] = (),
) -> str:
    """Create the repository if needed, and upload the directory in one commit.

    The token is what huggingface_hub finds (`hf auth login`, HF_TOKEN); it is never taken as an
    argument, printed, or stored. A README.md that is there already is kept.

    Args:
        directory: a merged checkpoint.
        repo_id: `name` or `org/name`.
        private: whether a repository that has to be made is private.
        data: name of the training data, for the card.
        log_history: the Trainer's, for the losses in the card.

    Returns:
        Address of the repository.

    Raises:
        OutputError: it is not merged, or the Hub refused it.
    """
    checkpoint = open_quantized(directory)
    if checkpoint.config.merged is None:
        raise OutputError(f"{directory}: is not a merged checkpoint; nothing was pushed.")
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        card = checkpoint.directory / CARD_FILE
        if not card.exists():
            model_card(checkpoint, repo.repo_id, data, log_history).save(card)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=checkpoint.directory,
            commit_message="Upload merged QA-LoRA checkpoint",
        )
    except _FAILURES as error:
        raise OutputError(
            f"{repo_id}: the Hub did not take the checkpoint ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). It is complete in {checkpoint.directory}: log in with "
            f"`hf auth login`, then `hf upload {repo_id} {checkpoint.directory}`."
        ) from error
    return str(repo)


def model_card(
    checkpoint: QuantizedCheckpoint,
    repo_id: str,
    data: str | None = None,
    log_history: Sequence[dict[str, Any]] = (),
) -> ModelCard:
    """The card of a merged checkpoint; arguments as for `push_merged`."""
    config, merged = checkpoint.config, checkpoint.config.merged or {}
    base = str(config.base.get("name_or_path") or "")
    is_public_name = bool(base) and not Path(base).is_absolute() and base.count("/") <= 1
    name = base if is_public_name else Path(base).name
    rows = {
        "base": name or "unknown",
        "bits": config.bits,
        "group size": config.group_size,
        "quantized with": config.method,
        "adapted": merged.get("adapt"),
        "rank": merged.get("r"),
        "lora_alpha": merged.get("lora_alpha"),
        "adapted layers": merged.get("layers"),
        "training data": data or "not recorded",
        **_losses(log_history),
    }
    card_data = ModelCardData(
        library_name="transformers",
        base_model=base if is_public_name else None,
        license=_licence(base, is_public_name),
        tags=["qalora", "qa-lora", f"int{config.bits}"],
    )
    text = _TEXT.format(
        title=repo_id.rpartition("/")[2],
        base_line=f"`{name}`" if name else "A base model",
        bits=config.bits,
        group_size=config.group_size,
        scales="" if merged.get("adapt") == "zeros" else " and scales",
        repo_id=repo_id,
        rows="\n".join(f"| {key} | {value} |" for key, value in rows.items()),
    )
    return ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}")


def _losses(log_history: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The last training and evaluation loss, where there are any."""
    found = {}
    for title, key in (("training loss", "loss"), ("evaluation loss", "eval_loss")):
        values = [entry for entry in log_history if key in entry]
        if values:
            found[title] = f"{values[-1][key]:.4f} (step {values[-1].get('step')})"
    return found


def _licence(base: str, is_public_name: bool) -> str | None:
    """The licence that the base's own card names, if it can be read."""
    card = Path(base) / CARD_FILE
    if not card.exists() and not is_public_name:
        return None
    try:
        return ModelCard.load(card if card.exists() else base).data.license
    except (*_FAILURES, ValueError):
        return None
