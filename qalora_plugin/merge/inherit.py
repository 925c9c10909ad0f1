"""What a merged directory has beside its weights: of the base, or as the adapter was trained with.

tokenizer, processor   the adapter's where it has one, whole: no file of the base's stays that
                       would override it (a chat_template.jinja over the template in
                       tokenizer_config.json, say)
generation config      the adapter's where it has one; else the base's, with the special tokens
                       of the adapter's tokenizer, as the Trainer sets them in training
everything else        the base's: licence, code, notes
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..checkpoint.side_files import TOKENIZER_FILES, copy_side_files
from ..errors import CheckpointError
from ..files.json import read_json, write_json
from ..files.names import GENERATION_CONFIG_FILE, TOKENIZER_CONFIG_FILE

_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
_SETTINGS = (TOKENIZER_CONFIG_FILE, "special_tokens_map.json")
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "merges.txt", "spiece.model",
               "vocab.*", "added_tokens.json")  # fmt: skip
_PROCESSORS = ("*processor_config.json",)
_TOKENS = ("eos", "bos", "pad")


def inherit(base: QuantizedCheckpoint, adapter: Path, target: Path) -> None:
    """Write everything but weights and config.json of a merged directory."""
    base.write_side_files(target)
    if _has(adapter, _VOCABULARY):
        _remove(target, _VOCABULARY)
    if _has(adapter, _SETTINGS):
        _remove(target, (*_SETTINGS, *_TEMPLATES))
    elif _has(adapter, _TEMPLATES):
        _remove(target, _TEMPLATES)
    copy_side_files(adapter, target, {*TOKENIZER_FILES, *_TEMPLATES, *_VOCABULARY, *_PROCESSORS})
    generation = target / GENERATION_CONFIG_FILE
    if (adapter / GENERATION_CONFIG_FILE).is_file():
        copy_side_files(adapter, target, (GENERATION_CONFIG_FILE,))
    elif generation.exists():
        found = read_json(generation)
        write_json(generation, _aligned(found, special_tokens(adapter), several_ends=True))


def remove_inherited(adapter: Path) -> None:
    """Remove beside an adapter all that a merge would take from there, to be written anew."""
    generation = (GENERATION_CONFIG_FILE,)
    _remove(adapter, (*_SETTINGS, *_TEMPLATES, *_VOCABULARY, *_PROCESSORS, *generation))


def with_special_tokens(config: dict[str, Any], adapter: Path) -> dict[str, Any]:
    """Return a config.json with the special tokens that an adapter was trained with."""
    tokens, text = special_tokens(adapter), config.get("text_config")
    if isinstance(text, dict):
        config = {**config, "text_config": _aligned(text, tokens)}
    return _aligned(config, tokens)


def special_tokens(adapter: Path) -> dict[str, int]:
    """Return the ids that an adapter's tokenizer states for `eos_token_id` and so on.

    Raises:
        CheckpointError: a file of the tokenizer cannot be read.
    """
    path = adapter / TOKENIZER_CONFIG_FILE
    if not path.is_file():
        return {}
    stated, found, ids = read_json(path), {}, _token_ids(adapter)
    for kind in _TOKENS:
        token = stated.get(f"{kind}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            found[f"{kind}_token_id"] = ids[text]
    return found


def _token_ids(adapter: Path) -> dict[str, int]:
    """Return the id of every token by its text, as tokenizer.json and the config give them."""
    ids: dict[str, Any] = {}
    path = adapter / "tokenizer.json"
    try:
        if path.is_file():
            content = read_json(path)
            vocabulary = content["model"].get("vocab", {})
            if isinstance(vocabulary, list):  # Unigram: [text, score]
                vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
            ids |= vocabulary
            ids |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        added = read_json(adapter / TOKENIZER_CONFIG_FILE).get("added_tokens_decoder") or {}
        ids |= {token["content"]: int(index) for index, token in added.items()}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: is not the vocabulary of a tokenizer ({error!r}). Save or copy it again."
        ) from error
    return {text: index for text, index in ids.items() if isinstance(index, int)}


def _aligned(
    config: dict[str, Any], tokens: dict[str, int], *, several_ends: bool = False
) -> dict[str, Any]:
    """Return a config with these tokens, as transformers' `align_special_tokens` sets them.

    A generation config keeps the ends that it has: any of them halts.
    """
    changed: dict[str, Any] = dict(tokens)
    end = tokens.get("eos_token_id")
    if several_ends and end is not None:
        before = config.get("eos_token_id")
        ends = before if isinstance(before, list) else [before]
        changed["eos_token_id"] = before if end in ends else [end, *filter(_is_id, ends)]
    return {**config, **changed}


def _is_id(value: Any) -> bool:
    return isinstance(value, int)


def _has(directory: Path, patterns: Iterable[str]) -> bool:
    return any(path.is_file() for pattern in patterns for path in directory.glob(pattern))


def _remove(directory: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in directory.glob(pattern):
            path.unlink()
