"""What a file or directory is, by config.json and the names of files alone; no tensor is read."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..files.hub import resolve_model_dir, resolve_model_file
from ..files.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, RECORD_FILE
from ..files.schemas import ConfigFile, Record, read_as
from .format import Format, formats


@dataclass(frozen=True)
class Kind:
    """The content of a file or directory; an adapter and a model may lie side by side.

    Args:
        is_adapter: whether it has an adapter's config.
        is_16_bit: whether it is a model that is not quantized.
        method: `quant_method` of config.json's `quantization_config`, such as "qalora".
        format: the foreign format that it is in, which may be one of adapters.
        base: the foreign format in which its model is read as a quantized base.
        export: name of the format of an export that only other runtimes read.
    """

    is_adapter: bool = False
    is_16_bit: bool = False
    method: str | None = None
    format: Format | None = None
    base: Format | None = None
    export: str | None = None


def find_model(name_or_path: str | Path, revision: str | None = None) -> Path:
    """Return where a model lies: a file in a format that is one file, or a directory.

    Args:
        name_or_path: the file, a directory, or a Hub id; a file on the Hub is `org/name/file`.
        revision: branch, tag or commit of the Hub repository.

    Raises:
        CheckpointError: there is no such model.
    """
    path, suffixes = Path(name_or_path).expanduser(), [f.suffix for f in formats() if f.suffix]
    if path.suffix in suffixes:
        return path if path.is_file() else resolve_model_file(name_or_path, revision)
    directory = resolve_model_dir(name_or_path, revision)
    if (directory / CONFIG_FILE).exists() or (directory / ADAPTER_CONFIG_FILE).exists():
        return directory
    files = sorted(file for suffix in suffixes for file in directory.glob(f"*{suffix}"))
    if len(files) > 1:
        raise CheckpointError(
            f"{directory}: holds {len(files)} models, each of one file. Name one of them: "
            + ", ".join(str(file) for file in files)
        )
    return files[0] if files else directory


def find_kind(path: str | Path) -> Kind:
    """Say what a file or directory holds; nothing, if it is not there.

    Raises:
        CheckpointError: config.json, or the record of an export, cannot be read.
    """
    path = Path(path)
    if path.is_file():
        format = next((f for f in formats() if f.suffix and path.suffix == f.suffix), None)
        is_base = format is not None and format.is_base
        export = None if format is None or is_base else format.name
        return Kind(format=format, base=format if is_base else None, export=export)
    has_config, has_record = (path / CONFIG_FILE).exists(), (path / RECORD_FILE).exists()
    config = read_as(path / CONFIG_FILE, ConfigFile) if has_config else {}
    stated = config.get("quantization_config")
    # what has files of its own first: an adapter may lie beside a quantized model's config.json
    known = sorted(formats(), key=lambda format: bool(format.quant_methods))
    found = [format for format in known if format.marks(config, path)]
    base = next((format for format in found if format.is_base), None)
    record = read_as(path / RECORD_FILE, Record) if has_record else {}
    export = None if record.get("written_back") else record.get("format")
    read = [f.name for f in known if (f.is_base and f.reads_exports) or f.of_adapter]
    if export in read:
        export = None
    return Kind(
        is_adapter=(path / ADAPTER_CONFIG_FILE).exists(),
        is_16_bit=has_config and not stated and base is None,
        method=stated.get("quant_method") if isinstance(stated, dict) else None,
        format=found[0] if found else None,
        base=None if export else base,
        export=export,
    )
