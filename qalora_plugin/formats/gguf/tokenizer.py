"""A Hugging Face tokenizer as GGUF metadata: without a right one llama.cpp mis-tokenizes or aborts.

Two kinds are read from tokenizer.json, as llama.cpp's convert_hf_to_gguf.py knows them:

    byte-level BPE (GPT-2, Llama 3, Qwen): tokens and merges; `tokenizer.ggml.pre` names the
        expression that splits text, which llama.cpp has built in
    BPE with byte fallback (Llama 2, Mistral, Gemma; once SentencePiece): tokens and scores.
        SentencePiece's score of a merged token is minus the rank of its merge
"""

import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from ...checkpoint.side_files import chat_templates
from ...errors import CheckpointError
from ...files.json import read_json
from ...files.names import CONFIG_FILE
from ...files.schemas import BPE, TokenizerFile, check_types, read_as

_log = logging.getLogger(__name__)
TOKENIZER_FILE = "tokenizer.json"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp's names of expressions that split text (llama-vocab.cpp, llm_tokenizer_bpe)
SPLITS = {
    "llama-bpe": _CONTRACTIONS + r"\p{N}{1,3}" + _REST,
    "qwen2": _CONTRACTIONS + r"\p{N}" + _REST,
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
IGNORES_MERGES = ("llama-bpe", "tekken")
"""Those with which a whole word that is a token is that token, whatever the merges say."""
_NAMES = {expression: name for name, expression in SPLITS.items()}


class Tokenizer:
    """tokenizer.json of a model directory, checked to be one that GGUF can hold."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """Read and check it, for an embedding of `vocab_size` rows.

        Raises:
            CheckpointError: it is missing, of another kind, or has more tokens than the model.
        """
        path = directory / TOKENIZER_FILE
        if not path.exists():
            raise CheckpointError(
                f"{path}: missing, and llama.cpp needs the tokenizer in its file. Save it with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
            )
        self.directory, self.path, self.vocab_size = directory, path, vocab_size
        self._json = read_as(path, TokenizerFile)
        model = self._json["model"]
        if model.get("type", "BPE") != "BPE" or "merges" not in model:
            raise CheckpointError(
                f"{path}: a tokenizer of type {model.get('type')}; only BPE (Llama, Qwen, Mistral, "
                "Gemma) can be written to GGUF."
            )
        check_types(model, BPE, f"{path}: model", CheckpointError)
        self.is_bpe = self._is_byte_level(model)
        self.pre = self._split() if self.is_bpe else "default"
        self.added = {token["id"]: token for token in self._json.get("added_tokens", [])}
        largest = max([0, *model["vocab"].values(), *self.added])
        if largest >= vocab_size:
            raise CheckpointError(
                f"{path}: has a token {largest}, the model's vocabulary {vocab_size} rows."
            )

    def _steps(self) -> list[dict[str, Any]]:
        steps = self._json.get("pre_tokenizer") or {}
        found: list[dict[str, Any]] = steps.get("pretokenizers", [steps])
        return found

    def _is_byte_level(self, model: dict[str, Any]) -> bool:
        """Say which of the two kinds it is.

        transformers' conversion of GGUF files writes `byte_fallback` into tokenizers that split
        text into bytes; llama.cpp, told so, looks for tokens of bytes and fails every request.

        Raises:
            CheckpointError: bytes are what it falls back to, and the vocabulary has not all.
        """
        if not model.get("byte_fallback"):
            return True
        lost = [name for name in map("<0x{:02X}>".format, range(256)) if name not in model["vocab"]]
        if lost and not any(step.get("type") == "ByteLevel" for step in self._steps()):
            raise CheckpointError(
                f"{self.path}: byte_fallback is true, and the vocabulary lacks {len(lost)} of the "
                f"256 tokens of bytes, {lost[0]} the first: llama.cpp would fail every request. "
                "Take the tokenizer files of the model that the base was made from."
            )
        return bool(lost)

    def _split(self) -> str:
        steps = self._steps()
        kinds = [step.get("type") for step in steps]
        splits = [
            step.get("pattern", {}).get("Regex", step.get("pattern", {}).get("String"))
            for step in steps
            if step.get("type") == "Split"
        ]
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and splits[0] in _NAMES:
            return _NAMES[splits[0]]
        raise CheckpointError(
            f"{self.path}: splits text by {splits or kinds}, which is none of the ways that are "
            f"known to be llama.cpp's ({', '.join(['gpt-2', 'smollm', *SPLITS])}). "
            "Another one would mis-tokenize."
        )

    def add_to(self, writer: Any, gguf: ModuleType) -> None:
        """Write tokens, scores or merges, special tokens and the chat template."""
        tokens, scores, types = self._tokens(gguf.TokenType)
        writer.add_tokenizer_model("gpt2" if self.is_bpe else "llama")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(tokens)
        if not self.is_bpe:
            writer.add_token_scores(scores)
            writer.add_add_space_prefix(self._adds_space())
        writer.add_token_types(types)
        special = gguf.SpecialVocab(
            self.directory, load_merges=self.is_bpe, n_vocab=self.vocab_size
        )
        self._mend_eos(special)
        # llama.cpp would add them by its own default
        special.add_special_token.setdefault("bos", False)
        special.add_special_token.setdefault("eos", False)
        templates = chat_templates(self.directory)  # gguf-py prefers other files
        listed = [{"name": name, "template": text} for name, text in templates.items()]
        special.chat_template = (
            listed if templates.keys() - {"default"} else templates.get("default")
        )
        special.add_to_gguf(writer, quiet=True)

    def _mend_eos(self, special: Any) -> None:
        """Take eos from config.json where the tokenizer's is its bos, and config.json differs.

        transformers' conversion of GGUF files sets eos to bos: answers would never end.
        """
        ids = special.special_token_ids
        path = self.directory / CONFIG_FILE
        stated = read_json(path).get("eos_token_id") if path.exists() else None
        stated = [stated] if isinstance(stated, int) else stated or []
        if ids.get("eos") == ids.get("bos") and stated and ids.get("eos") not in stated:
            _log.warning(
                "%s: eos and bos are one token, %s, and %s says that eos is %s, which is written",
                *(self.directory, ids.get("bos"), CONFIG_FILE, stated[0]),
            )
            ids["eos"] = stated[0]

    def _tokens(self, kinds: Any) -> tuple[list[str], list[float], list[int]]:
        """Return text, score and type of every row of the embedding."""
        names = [f"[PAD{i}]" for i in range(self.vocab_size)]
        types = [int(kinds.UNUSED)] * self.vocab_size
        scores = [-1e6] * self.vocab_size
        vocab = self._json["model"]["vocab"]
        unknown = self._json["model"].get("unk_token")
        for token, i in vocab.items():
            names[i], types[i] = token, int(kinds.NORMAL)
            if not self.is_bpe and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
                types[i] = int(kinds.BYTE)
            elif token == unknown:
                types[i] = int(kinds.UNKNOWN)
        for i, token in self.added.items():
            names[i] = token["content"]
            if types[i] != int(kinds.UNKNOWN):
                types[i] = int(kinds.CONTROL if token.get("special") else kinds.USER_DEFINED)
        if not self.is_bpe:
            for rank, merge in enumerate(self._json["model"]["merges"]):
                merged = vocab.get("".join(merge.split(" ") if isinstance(merge, str) else merge))
                if merged is not None and scores[merged] == -1e6:
                    scores[merged] = -float(rank)
        return names, scores, types

    def _adds_space(self) -> bool:
        """Say whether text gets a space in front, as with Llama 2 and not with Gemma."""
        normalizer = self._json.get("normalizer") or {}
        steps = normalizer.get("normalizers", [normalizer])
        pre = self._json.get("pre_tokenizer") or {}
        return any(step.get("type") == "Prepend" for step in steps) or (
            pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") != "never"
        )
