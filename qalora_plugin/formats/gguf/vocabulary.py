"""A Hugging Face tokenizer from a GGUF file's metadata; ids are llama.cpp's.

    tokenizer.ggml.model "gpt2"     byte-level BPE: tokens and merges; `tokenizer.ggml.pre` names
                                    how text is split, see `tokenizer`
    tokenizer.ggml.model "llama"    once SentencePiece: tokens and scores, bytes as a last resort

llama.cpp normalises nothing, splits off control and user-defined tokens first, and adds bos and eos
as the file says.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers import processors as post
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

from ...errors import CheckpointError
from .tokenizer import IGNORES_MERGES, SPLITS

_NORMAL, _CONTROL, _USER_DEFINED, _BYTE = 1, 3, 4, 6  # gguf.TokenType
_SPACE = "▁"
# llama.cpp's other names of a way to split (llama-vocab.cpp)
_SAME_SPLIT = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "llama-bpe"), "llama-bpe"),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "kormo"), "qwen2"),
    **dict.fromkeys(("gpt-2", "phi-2", "jina-es", "mellum"), "gpt-2"),
    **dict.fromkeys(("smollm", "tekken")),
}
_SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


class Vocabulary:
    """Tokens, special tokens and chat template of a GGUF file."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        """Check that it is of a kind that is read; nothing is built yet.

        Raises:
            CheckpointError: a tokenizer, or a way to split text, that is not read.
        """
        self._path, self._fields = path, fields
        self._kind = self._get("model")
        self._pre = str(self._get("pre", "default"))
        if self._kind not in ("gpt2", "llama"):
            raise self._unread(f"tokenizer.ggml.model {self._kind!r}", "'gpt2' and 'llama' are")
        if self._kind == "gpt2" and self._pre not in _SAME_SPLIT:
            raise self._unread(f"tokenizer.ggml.pre {self._pre!r}", f"{sorted(_SAME_SPLIT)} are")
        needed = ("tokens", "merges" if self._kind == "gpt2" else "scores")
        for name in needed:
            if not self._get(name):
                raise CheckpointError(
                    f"{path}: no tokenizer.ggml.{name}. The file is incomplete: download it again."
                )
        count = len(self._get("tokens"))
        for name in ("scores", "token_type"):
            found = self._get(name)
            if found and len(found) != count:
                raise CheckpointError(
                    f"{path}: tokenizer.ggml.{name}: expected a value for each of the {count} "
                    f"tokens, found {len(found)}. The file is damaged: download it again."
                )

        for name in (*_SPECIAL, "eot"):
            index = self._get(f"{name}_token_id")
            if index is not None and not isinstance(index, int):
                raise CheckpointError(
                    f"{path}: tokenizer.ggml.{name}_token_id: expected the number of a token, "
                    f"found {index!a:.80}. The file is damaged: download it again."
                )

    def _get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(f"tokenizer.ggml.{key}", default)

    def _unread(self, what: str, known: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: {what} is not read, {known}: other ids than llama.cpp's would be "
            "trained. Quantize the 16-bit model with `qalora quantize`."
        )

    def _token(self, key: str) -> str | None:
        index = self._get(f"{key}_token_id")
        tokens = self._get("tokens")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None

    def save(self, directory: Path) -> None:
        """Write tokenizer files, chat template and generation_config.json."""
        special = {f"{ours}_token": self._token(key) for key, ours in _SPECIAL.items()}
        made = PreTrainedTokenizerFast(
            tokenizer_object=self._tokenizer(),
            clean_up_tokenization_spaces=False,
            **{key: token for key, token in special.items() if token is not None},
        )
        made.chat_template = self._fields.get("tokenizer.chat_template")
        made.save_pretrained(directory)
        ends = [self._get(f"{key}_token_id") for key in ("eos", "eot")]
        ends = sorted({end for end in ends if end is not None})
        GenerationConfig(
            bos_token_id=self._get("bos_token_id"),
            eos_token_id=ends if len(ends) > 1 else (ends or [None])[0],
            pad_token_id=self._get("padding_token_id"),
        ).save_pretrained(directory)

    def _types(self) -> list[int]:
        """Return the kind of every token; without a list all are normal, as llama.cpp has it."""
        return self._get("token_type") or [_NORMAL] * len(self._get("tokens"))

    def _tokenizer(self) -> Tokenizer:
        try:
            made = self._byte_level() if self._kind == "gpt2" else self._sentencepiece()
        except Exception as error:  # tokenizers has no class of its own for them
            raise CheckpointError(
                f"{self._path}: tokenizer.ggml: no tokenizer can be made of its tokens and merges: "
                f"{error}. The file is damaged: download it again."
            ) from error
        added = [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in zip(self._get("tokens"), self._types(), strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
        made.add_tokens(added)
        made.post_processor = self._ends(made.post_processor)
        return made

    def _byte_level(self) -> Tokenizer:
        split = _SAME_SPLIT[self._pre] or self._pre
        vocab = {token: index for index, token in enumerate(self._get("tokens"))}
        merges = [tuple(merge.split(" ", 1)) for merge in self._get("merges")]
        made = Tokenizer(BPE(vocab, merges, ignore_merges=split in IGNORES_MERGES))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if split == "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            made.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        elif split == "gpt-2":
            made.pre_tokenizer = byte_level
        else:
            by = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
            plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            made.pre_tokenizer = pre_tokenizers.Sequence([by, plain])
        made.decoder = decoders.ByteLevel()
        made.post_processor = post.ByteLevel(trim_offsets=False)
        return made

    def _sentencepiece(self) -> Tokenizer:
        from transformers.tokenization_utils_base import generate_merges

        tokens, scores = self._get("tokens"), self._get("scores")
        vocab = {token: index for index, token in enumerate(tokens)}
        apart = {
            t for t, kind in zip(tokens, self._types(), strict=True) if kind in (_CONTROL, _BYTE)
        }
        merges = generate_merges(vocab, dict(zip(tokens, scores, strict=True)), apart)
        fallback = "<0x00>" in vocab  # else an unknown character would have no bytes to fall to
        unknown = self._token("unknown")
        model = BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
        made = Tokenizer(model)
        prefix = bool(self._get("add_space_prefix", True))
        steps: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
        made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
        ends: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
        made.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
        )
        return made

    def _ends(self, processor: Any) -> Any:
        """Return a post-processor that adds bos and eos as llama.cpp does with this file."""
        default = self._kind == "llama" or _SAME_SPLIT[self._pre] == "llama-bpe"
        bos = self._token("bos") if self._get("add_bos_token", default) else None
        eos = self._token("eos") if self._get("add_eos_token", False) else None
        around = [token for token in (bos, eos) if token is not None]
        if not around:
            return processor
        one = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
        two = [*one, *(part.replace("A:0", "B:0").replace(":0", ":1") for part in one)]
        ids = [(token, self._get("tokens").index(token)) for token in around]
        template = post.TemplateProcessing(single=one, pair=two, special_tokens=ids)
        return template if processor is None else post.Sequence([processor, template])
