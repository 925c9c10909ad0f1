"""The schemas of the JSON files that are read: which keys are used, and the types of their values.

Keys that are not listed are let through. Types are not converted: "4" is no number, and true none
either. Ranges and contradictions are checked by the code that uses a value.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, NotRequired

from annotated_types import Interval

# pydantic wants this one on Python 3.11
from typing_extensions import TypedDict

from ..errors import CheckpointError, QALoRAError
from .json import read_json

Object = dict[str, Any]
Count = Annotated[int, Interval(gt=-(1 << 31), lt=1 << 31)]
Size = Annotated[int, Interval(ge=0, lt=1 << 63)]
_Names = list[str] | str | None
_SHOWN = 80  # characters of a value in a message


class AnyQuantization(TypedDict, total=False):
    """`quantization_config` of a model that anybody quantized."""

    quant_method: str | None


class ConfigFile(TypedDict, total=False):
    """config.json of a model."""

    architectures: list[str] | None
    model_type: str
    quantization_config: AnyQuantization | None
    text_config: Object | None
    tie_word_embeddings: bool | None
    vocab_size: Count | None


class MergedEntry(TypedDict, total=False):
    """`merged` of our quantization config, as far as it is read."""

    adapter: str
    adapt: str
    adapters: list[Object]


class ManifestEntry(TypedDict):
    """One file in our manifest, or of the source of a base; it has one of the two hashes."""

    size: Size
    xxh3_128: NotRequired[str]
    sha256: NotRequired[str]


class SourceEntry(TypedDict):
    """`source` of `base`: where a base in a foreign format was read from."""

    format: str
    path: str
    frozen: dict[str, list[str]]
    repo: NotRequired[str]
    revision: NotRequired[str]
    file: NotRequired[str]
    files: NotRequired[dict[str, ManifestEntry]]


class BaseEntry(TypedDict, total=False):
    """`base` of our quantization config, as far as it is read."""

    name_or_path: str | None
    fingerprint: str | None
    source: SourceEntry | None


class QuantizationConfig(TypedDict, total=False):
    """Our `quantization_config` in config.json, as far as its own class does not check it."""

    desc_act: bool
    modules_to_not_convert: list[str] | None
    dynamic: dict[str, Object] | None
    base: BaseEntry | None
    merged: MergedEntry | None


class CompressedTensors(TypedDict, total=False):
    """`quantization_config` of compressed-tensors, as far as its reader does not check it."""

    sparsity_config: Object | None
    transform_config: Object | None


class CompressedGroup(TypedDict, total=False):
    """One of its `config_groups`."""

    targets: list[str] | None


class AdapterConfig(TypedDict, total=False):
    """adapter_config.json, of a QALORA or a LORA adapter."""

    peft_type: str
    r: Count
    lora_alpha: float
    rank_pattern: dict[str, Count] | None
    alpha_pattern: dict[str, float] | None
    use_rslora: bool | None
    target_modules: _Names
    exclude_modules: _Names
    modules_to_save: list[str] | None
    layers_to_transform: list[Count] | Count | None
    layers_pattern: _Names
    base_model_name_or_path: str | None
    revision: str | None
    task_type: str | None
    auto_mapping: dict[str, str | None] | None
    bias: str
    adapt: str
    bits: Count | None
    group_size: Count | None
    fingerprint: str | None
    base_merged: MergedEntry | None
    base_refined: dict[str, Any] | None
    convention: str | None
    use_qalora: bool | None
    qalora_group_size: Count | None


class Index(TypedDict):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]
    metadata: NotRequired[Object]


class Manifest(TypedDict):
    """qalora_manifest.json."""

    version: Count
    files: dict[str, ManifestEntry]
    bound: NotRequired[dict[str, Object]]


class SourceFacts(TypedDict, total=False):
    """`source` in the record of an export."""

    base: str | None
    licence: str | None
    bits: Count | None
    group_size: Count | None
    mixed: bool
    method: str | None
    fine_tuned: bool
    adapt: str | None
    r: Count | None
    lora_alpha: float | None
    layers: Count | None


class Measured(TypedDict, total=False):
    """`measured` in the record of an export."""

    tokens: Count
    exact: float
    requantized: float
    divergence: float


class Record(TypedDict, total=False):
    """qalora_export.json."""

    format: str
    exactness: str
    source: SourceFacts
    measured: Measured | None


class NamedTemplate(TypedDict):
    """One of several chat templates in tokenizer_config.json."""

    name: str
    template: str


class TokenizerConfig(TypedDict, total=False):
    """tokenizer_config.json, as far as chat templates are read from it."""

    chat_template: list[NamedTemplate] | str | None


class AddedToken(TypedDict):
    """A token in tokenizer.json that is split off before anything else."""

    id: Size
    content: str
    special: NotRequired[bool]


class Step(TypedDict, total=False):
    """One step of splitting or normalizing in tokenizer.json."""

    type: str
    pattern: dict[str, str]
    pretokenizers: list["Step"]
    normalizers: list["Step"]


class TokenizerFile(TypedDict):
    """tokenizer.json, as far as GGUF is made of it."""

    model: Object
    added_tokens: NotRequired[list[AddedToken]]
    pre_tokenizer: NotRequired[Step | None]
    normalizer: NotRequired[Step | None]


class BPE(TypedDict):
    """`model` in tokenizer.json, of a BPE."""

    vocab: dict[str, Size]
    merges: list[str] | list[list[str]]


class LayerReport(TypedDict, total=False):
    """One layer in quantization_report.json, as far as it is read."""

    error: float | None


class QuantizationReport(TypedDict):
    """quantization_report.json, as far as a model card reads it."""

    layers: dict[str, LayerReport]


class Card(TypedDict, total=False):
    """The front matter of a README.md, as far as it is read."""

    license: str | None


def read_as(path: Path, schema: Any, error: type[QALoRAError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object whose keys have the types of one of the classes above.

    Args:
        path: the file.
        schema: the class.
        error: what to raise for a value of another type.

    Raises:
        CheckpointError: see `read_json`.
        QALoRAError: of the class `error`: names the key, the type that was expected, and the value.
    """
    value = read_json(path)
    check_types(value, schema, str(path), error)
    return value


def check_types(value: Any, schema: Any, where: str, error: type[QALoRAError]) -> None:
    """Check the types of a value that was read already; `where` names it in the message.

    Raises:
        QALoRAError: of the class `error`.
    """
    from pydantic import ValidationError

    try:
        _adapter(schema).validate_python(value, strict=True)
    except ValidationError as found:
        first = found.errors(include_url=False, include_context=False)[0]
        key = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
        shown = f"{first['input']!a}"
        if len(shown) > _SHOWN:
            shown = shown[:_SHOWN] + "..."
        expected = first["msg"].removeprefix("Input should be ")
        what = f"expected {expected}, found {shown}"
        if first["type"] == "missing":
            what = "missing"
        raise error(f"{where}: {key or 'the whole'}: {what}. Restore the original file.") from found


def _is_branch(part: Any) -> bool:
    """Say whether a part of a location names a branch of a union instead of a key."""
    return isinstance(part, str) and (
        part.startswith(("list[", "constrained-")) or part in ("str", "int")
    )


@cache
def _adapter(schema: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)
