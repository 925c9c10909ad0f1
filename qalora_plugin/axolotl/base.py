"""The quantized base of an Axolotl run: made once, found again by every rank and later run."""

import fcntl
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qalora_kernels.stored import QUANT_METHOD

from ..architecture.model import read_hf_config
from ..checkpoint.kind import find_kind
from ..distributed.ranks import on_main_process
from ..errors import CheckpointError, ConfigError, QuantizationError
from ..files.hub import resolve_model_dir
from ..files.manifest import check_manifest
from ..files.names import CONFIG_FILE
from ..files.reader import CheckpointReader
from ..quantize.calibration import cut_windows, join_tokens, longest_row
from ..quantize.options import QuantizeOptions
from ..quantize.rows import fields_of
from .args import options_of

_MAX_SEQ_LEN = 2048


def is_quantized(base_model: str, revision: str | None = None) -> bool:
    """Say whether `base_model` is an INT-n directory already, ours or in a foreign format.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it is quantized by a method that has no INT-n grid with groups.
    """
    directory = resolve_model_dir(base_model, revision)
    _ = CheckpointReader(directory).config  # weights and config have to be readable
    kind = find_kind(directory)
    if kind.is_16_bit:
        return False
    if kind.base is None and kind.method != QUANT_METHOD:
        raise ConfigError(
            f"base_model: {base_model} is quantized with quant_method {kind.method!r}; adapter: "
            "qalora needs a 16-bit model, one written by `qalora quantize`, or a GPTQ checkpoint"
        )
    return True


def check_base(base_model: Any) -> None:
    """Refuse a local base that cannot be read, or that we cannot adapt; a Hub id is left alone.

    Raises:
        QALoRAError: names base_model, what was expected, and what to do.
    """
    text = str(base_model or "")
    if Path(text).expanduser().is_dir() or text.count("/") > 1 or text[:1] in (".", "/", "~"):
        try:
            is_quantized(text)
        except CheckpointError as error:
            raise CheckpointError(f"base_model: {error}") from error


def check_calibration(cfg: Any) -> None:
    """Refuse a `calibration` file that is not there.

    Raises:
        ConfigError: names it.
    """
    chosen = cfg.qalora.get("calibration")
    if chosen and not Path(chosen).expanduser().is_file():
        raise ConfigError(
            f"qalora: calibration: {chosen}: no such file; name a .txt or .jsonl file, or leave it "
            "out to calibrate on samples of the training set"
        )


def calibration_from_rows(
    dataset: Any, samples: int, seq_len: int, seed: int, tokenize: Callable[[str], list[int]]
) -> torch.Tensor:
    """Draw windows of token ids, int64 [<= samples, <= seq_len], from a training set.

    Its rows are tokenized (`input_ids`), or texts, such as the `prompt` and `chosen` of preference
    training. Windows are shorter where it has fewer than `seq_len` tokens.

    Raises:
        QuantizationError: the rows cannot be counted, or hold no tokens.
    """
    advice = "give a text file as `qalora: {calibration: FILE}`, or use `quantize_method: rtn`"
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise QuantizationError(
            "qalora: calibration samples cannot be drawn from a streaming or empty training set; "
            + advice
        )
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    parts = (_token_ids(dataset[index], tokenize) for index in order)
    stream = join_tokens(parts, samples * seq_len)
    if len(stream) < 2:
        raise QuantizationError(
            "qalora: calibration samples need rows with input_ids, or with the texts prompt and "
            f"chosen; the training set's have {sorted(dataset[0])}; {advice}"
        )
    return cut_windows(stream, samples, min(seq_len, len(stream)))


def _token_ids(row: Mapping[str, Any], tokenize: Callable[[str], list[int]]) -> list[int]:
    if row.get("input_ids"):
        return list(row["input_ids"])
    texts = [row.get(name) for name in fields_of(row) or ("prompt",)]
    return tokenize("".join(text for text in texts if isinstance(text, str)))


def quantized_base(cfg: Any, train_dataset: Any, tokenize: Callable[[str], list[int]]) -> Path:
    """Return the directory of this run's quantized base; quantize it if no earlier run has.

    Every rank calls this; rank 0 quantizes, the others wait and find the result.

    Raises:
        QALoRAError: the base or the calibration data cannot be used.
        RankError: rank 0 has died meanwhile, or cannot be reached.
    """
    block = cfg.qalora
    source = resolve_model_dir(cfg.base_model, cfg.revision_of_model)
    seed = int(cfg.seed or 0)
    settings = options_of(block) | {"seed": seed}
    if settings["offsets_at"] == "middle":  # is in no key: bases made before it stay valid
        del settings["offsets_at"]
    calibration: Any = None
    if settings["method"] == "gptq":
        samples = block["calibration_samples"]
        limits = (cfg.sequence_len, longest_row(read_hf_config(source)), _MAX_SEQ_LEN)
        seq_len = block.get("calibration_seq_len") or min(int(limit) for limit in limits if limit)
        if block.get("calibration"):
            check_calibration(cfg)
            calibration = Path(block["calibration"]).expanduser()
        else:
            drawn = QuantizeOptions(calibration=(), samples=samples, **settings).windows
            calibration = calibration_from_rows(train_dataset, drawn, seq_len, seed, tokenize)
            samples, seq_len = min(samples, len(calibration)), calibration.shape[1]
        settings |= {"samples": samples, "seq_len": seq_len}
    key = _key(source, settings, calibration)
    name = f"{Path(cfg.base_model).name}-int{settings['bits']}-g{settings['group_size']}-{key}"
    directory = cache_dir(cfg) / name

    def quantize() -> None:
        with _exclusive(directory.with_name(f".{name}.lock")):  # against other runs
            if not (directory / CONFIG_FILE).is_file():
                from ..quantize.pipeline import quantize_model

                quantize_model(source, directory, calibration=calibration, **settings)
            else:
                check_manifest(directory)

    on_main_process(quantize, "quantizing", f"base_model: {source} was not quantized")
    if not (directory / CONFIG_FILE).is_file():
        raise ConfigError(
            f"{directory}: rank 0 has written it, and this rank on another machine does not see "
            "it. Set `qalora: {quantized_model_dir: DIR}` to a directory that all machines share"
        )
    return directory


def cache_dir(cfg: Any) -> Path:
    """Return `quantized_model_dir`, by default the folder quantized_bases beside output_dir."""
    chosen = cfg.qalora.get("quantized_model_dir")
    if chosen:
        return Path(chosen).expanduser()
    return Path(cfg.output_dir).expanduser().absolute().parent / "quantized_bases"


def _key(source: Path, settings: dict[str, Any], calibration: Any) -> str:
    """Hash model files, settings and calibration data to 12 hexadecimal digits."""
    data = b""
    if calibration is not None:
        is_file = isinstance(calibration, Path)
        data = calibration.read_bytes() if is_file else calibration.numpy().tobytes()
    # a snapshot of the Hub has its commit in the path; a local directory its files' times
    where = str(source.resolve())
    return CheckpointReader(source).digest(data, source=where, settings=settings)[:12]


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Let one process in at a time; the lock of one that dies is free at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
