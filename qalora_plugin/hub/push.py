"""Push a quantized model, or an export of one, to the Hugging Face Hub, with a model card."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from qalora_kernels.stored import QUANT_METHOD

from ..checkpoint.source import public_config
from ..errors import OutputError, QALoRAError
from ..files.json import json_text, read_json
from ..files.manifest import check_manifest
from ..files.names import ADAPTER_CONFIG_FILE, CARD_FILE, CONFIG_FILE
from .card import HUB_FAILURES, Subject, find_subject, make_card

_REASONS = {
    401: "you are not logged in, or the token is not valid: log in with `hf auth login`",
    403: "your token may not write there: use one with write access, or push to another name",
    409: "it is being changed by someone else, or is there in another form: push again",
    412: "it has changed meanwhile: push again",
    404: "there is no such account, organisation or repository: check the name",
}


@dataclass(frozen=True)
class PushResult:
    """The files that were uploaded, or would be.

    Args:
        repo_id: where to.
        format: "qalora" for a model in our format, or the export's format.
        private: whether a repository that has to be made is private.
        revision: branch, or None for the main one.
        files: size in bytes of every file, by its name in the repository.
        card: the model card.
        url: address of the repository; None in a dry run.
    """

    repo_id: str
    format: str
    private: bool
    revision: str | None
    files: dict[str, int]
    card: str
    url: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """Return a few lines for people."""
        total = sum(self.files.values())
        what = f"{len(self.files)} files, {total / 1e6:.1f} MB, format {self.format}"
        if self.url is not None:
            return f"{self.url}: pushed {what}"
        kind = "private" if self.private else "public"
        lines = [f"{self.repo_id} ({kind}, branch {self.revision or 'main'}): would push {what}"]
        lines += [f"  {size:>14,}  {name}" for name, size in self.files.items()]
        return "\n".join([*lines, "", self.card])


def push(
    path: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    data: str | None = None,
    log_history: Sequence[dict[str, Any]] = (),
    dry_run: bool = False,
) -> PushResult:
    """Create the repository if needed, and upload everything in one commit.

    The token is what huggingface_hub finds (`hf auth login`, HF_TOKEN); it is never taken as an
    argument, printed, or stored. A README.md that is there already is kept; otherwise the model
    card is uploaded in its place, and not written to the disk.

    Args:
        path: a merged checkpoint, a quantized base, or what `export_model` wrote of one.
        repo_id: `name` or `org/name`.
        private: whether a repository that has to be made is private.
        revision: branch to push to, made if needed.
        data: name of the training data, for the card.
        log_history: the Trainer's, for the losses in the card.
        dry_run: touch no network, say what would be uploaded.

    Raises:
        OutputError: it is neither ours nor exported, its weights have changed since they were
            written, `repo_id` is no name of a repository, or the Hub refused it.
    """
    subject = _checked(path, repo_id)
    if not subject.tuned and (data or log_history):
        raise OutputError(
            f"{path}: was not fine-tuned, so a card of it has no training data and no losses. "
            "Leave out data (--data) and log_history (--trainer-state). Nothing was pushed."
        )
    files = subject.files()

    def result(name: str, url: str | None) -> PushResult:
        if CARD_FILE in files:
            card = files[CARD_FILE].read_text(encoding="utf-8", errors="replace")
        else:
            card = str(make_card(subject, name, data, log_history, online=not dry_run))
        sizes = {key: file.stat().st_size for key, file in files.items()}
        sizes.setdefault(CARD_FILE, len(card.encode()))
        return PushResult(name, subject.format, private, revision, sizes, card, url)

    if dry_run:
        return result(repo_id, None)
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        name, done = repo.repo_id, result(repo.repo_id, str(repo))
        operations = [CommitOperationAdd(key, _content(key, file)) for key, file in files.items()]
        if CARD_FILE not in files:
            operations.append(CommitOperationAdd(CARD_FILE, done.card.encode()))
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        api.create_commit(
            name,
            operations,
            commit_message=f"Upload QA-LoRA model, format {subject.format}",
            revision=revision,
        )
    except HUB_FAILURES as error:
        raise OutputError(_refusal(repo_id, subject.path, error)) from error
    return done


def _content(name: str, file: Path) -> str | bytes:
    """Return what is uploaded as a file: its path, or of a config what may be published."""
    if name not in (CONFIG_FILE, ADAPTER_CONFIG_FILE):
        return str(file)
    config = read_json(file)
    public = public_config(config)
    return str(file) if public == config else json_text(public).encode()


def push_merged(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    data: str | None = None,
    log_history: Sequence[dict[str, Any]] = (),
) -> str:
    """Push a merged checkpoint, and nothing else, as `push` does.

    Returns:
        The address of the repository.

    Raises:
        OutputError: it is not merged, or the Hub refused it.
    """
    subject = find_subject(directory)
    if subject.format != QUANT_METHOD or not subject.tuned:
        raise OutputError(f"{directory}: is not a merged checkpoint. Nothing was pushed.")
    result = push(directory, repo_id, private=private, data=data, log_history=log_history)
    assert result.url is not None
    return result.url


def _checked(path: str | Path, repo_id: str) -> Subject:
    """Return what is to be pushed, once its weights are known to be as they were written."""
    try:
        validate_repo_id(repo_id)
        subject = find_subject(path)
        if subject.path.is_dir():
            check_manifest(subject.path)
        return subject
    except HFValidationError as error:
        raise OutputError(
            f"{repo_id}: expected NAME or ORG/NAME, of letters, digits, '-', '_' and '.', at most "
            "96 of them, without '--' and '..'. Nothing was pushed."
        ) from error
    except QALoRAError as error:
        raise OutputError(f"{error} Nothing was pushed.") from error


def _refusal(repo_id: str, path: Path, error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    reason = _REASONS.get(
        status or 0, f"{what}; check the connection and log in with `hf auth login`"
    )
    where = f"HTTP {status}, " if status is not None else ""
    return (
        f"{repo_id}: the Hub did not take it ({where}{reason}). It is complete in {path}: push it "
        f"again with `qalora push {path} {repo_id}`."
    )
