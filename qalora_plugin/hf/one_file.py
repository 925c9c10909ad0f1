"""Let `from_pretrained` take a model that is one file, such as a .gguf, for a directory.

transformers looks for config.json, tokenizer and weights beside each other. Given a file that we
read as a base, or `org/name/file` on the Hub, its Auto classes and their kin get the directory that
the file was imported into, in the user's cache. `from_pretrained(repo, gguf_file=...)` stays
transformers' own, which makes a dense model, unless the quantization_config is ours.
"""

import functools
from pathlib import Path
from typing import Any

from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.convert import cached_import
from ..checkpoint.format import formats
from ..checkpoint.kind import find_model
from ..files.manifest import check_index

_INSTALLED = "_qalora_original"


def directory_of(name: Any, options: dict[str, Any]) -> Any:
    """Return what `from_pretrained(name, **options)` is to read; `gguf_file` is taken out if used.

    Raises:
        CheckpointError: the file is not there, or is no base that can be read.
    """
    if not isinstance(name, str | Path):
        return name
    file, ours = options.get("gguf_file"), options.get("quantization_config")
    if file is not None and isinstance(ours, QALoRAQuantConfig):
        del options["gguf_file"], options["quantization_config"]
        name = f"{name}/{file}"
    elif not any(format.suffix and str(name).endswith(format.suffix) for format in formats()):
        return name
    return str(cached_import(find_model(name, options.get("revision"))))


def install() -> None:
    """Wrap `from_pretrained` of the classes that read files; a second call does nothing."""
    from transformers import (
        AutoConfig,
        AutoProcessor,
        AutoTokenizer,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )
    from transformers.models.auto import modeling_auto

    autos = [found for name, found in vars(modeling_auto).items() if name.startswith("AutoModel")]
    others = (AutoConfig, AutoProcessor, AutoTokenizer)
    for owner in (*autos, *others, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase):
        # every Auto class has a copy of its own
        original: Any = vars(owner).get("from_pretrained")
        if original is not None and not hasattr(original.__func__, _INSTALLED):
            owner.from_pretrained = _wrapped(original.__func__, owner is PreTrainedModel)


def _wrapped(original: Any, loads_weights: bool) -> Any:
    @functools.wraps(original)
    def from_pretrained(
        cls: Any, pretrained_model_name_or_path: Any, *args: Any, **options: Any
    ) -> Any:
        name = directory_of(pretrained_model_name_or_path, options)
        if loads_weights and isinstance(name, str | Path):
            check_index(Path(name))
        return original(cls, name, *args, **options)

    setattr(from_pretrained, _INSTALLED, original)
    return classmethod(from_pretrained)
