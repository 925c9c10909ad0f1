"""Quantize a model block by block: one block in memory at a time, resumable after a kill."""

import dataclasses
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from qalora_kernels import QuantSpec

from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.format import format_named
from ..checkpoint.side_files import copy_side_files
from ..errors import ConfigError
from ..files.atomic import AtomicDirectory
from ..files.hub import resolve_model_dir
from ..files.json import write_json
from ..files.names import CONFIG_FILE
from .calibration import Calibration, calibration_windows
from .gptq import GPTQSettings
from .memory import release_freed_memory
from .options import (
    check_data_free,
    choose_layers,
    choose_zero_points,
    compute_dtype,
    fitting_length,
    usable_device,
)
from .resume import Report, leftovers, resume_tag
from .rtn import rtn
from .shards import BlockShards, Solved
from .source import ModelSource
from .walk import Walk

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class QuantizeResult:
    """What `quantize_model` wrote.

    Args:
        out: the finished directory.
        layers: per quantized layer {"bits", "group_size", "error"}; the error is relative to the
            layer's output on the calibration inputs, None for data-free ones and where that output
            is all zero.
        kept: linear modules that stayed in 16 bits.
        resumed: blocks that an earlier, interrupted run had finished.
    """

    out: Path
    layers: dict[str, dict[str, Any]]
    kept: list[str]
    resumed: int


def quantize_model(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    bits: int = 4,
    group_size: int = 32,
    method: Literal["gptq", "rtn"] = "gptq",
    calibration: Calibration | None = None,
    tokenizer: Any = None,
    samples: int = 128,
    seq_len: int | None = None,
    seed: int = 0,
    zero_points: Literal["real", "integer"] | None = None,
    offsets_at: Literal["middle", "minimum"] = "middle",
    format: Literal["qalora", "gptq", "gptq_v2"] = "qalora",
    desc_act: bool = False,
    ordering: Literal["groups", "none"] = "groups",
    mse: bool = True,
    damp: float = 0.01,
    dynamic: dict[str, dict[str, int]] | None = None,
    modules_to_not_convert: list[str] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> QuantizeResult:
    """Quantize the linear layers in a model's blocks and write the result as a checkpoint.

    Beside one block, only the calibration activations are in memory. A run that was killed goes on
    where it stopped when it is started again with the same arguments, and ends in the same bytes.

    Args:
        model: directory or Hub id of a 16-bit model, or a model in memory (it is saved to a
            temporary directory first, and not resumable).
        out: directory to make; it must not exist, or be empty.
        bits: 2, 3, 4 or 8.
        group_size: inputs that share a scale and an offset: any positive number up to the widest
            layer's inputs (the last group of a layer may be short), or -1 for one group.
        method: "gptq" with calibration text, or "rtn" without.
        calibration: text for GPTQ, see `calibration.calibration_windows`.
        tokenizer: by default the model's own.
        samples: calibration windows.
        seq_len: tokens in a window; by default 512, or the model's limit where that is less.
        seed: of the choice of windows.
        zero_points: "real" offsets (default), or "integer" zero-points, which stock formats need.
        offsets_at: which weight of a group fp16 holds: "middle", the one at the middle code, or
            "minimum", the one at code 0: for models that will be run by llama.cpp, whose Q4_1
            then holds what was trained bit for bit. In memory offsets take 4 bytes, not 2.
        format: "qalora", or "gptq" (v1) or "gptq_v2" for a stock checkpoint that other runtimes
            load.
        desc_act: act-order: round inputs by size, groups scattered and listed in g_idx.
        ordering: without desc_act, "groups" (larger groups first, groups contiguous) or "none".
        mse: search clipped ranges for each group.
        damp: added to the diagonal of the second moment, as a fraction of its mean.
        dynamic: other `bits` and `group_size` for some modules, {name or pattern: {...}}; see
            `QALoRAQuantConfig`.
        modules_to_not_convert: modules in the blocks that stay in 16 bits; see there too.
        dtype: of the activations; by default the model's.
        device: where blocks are run and solved.
        revision: of a Hub repository.
        trust_remote_code: run the model's own Python code.
        progress: show a progress bar on stderr.

    Raises:
        ConfigError: a setting is out of range, contradicts another, or does not fit the model.
        CheckpointError: the model is quantized already, incomplete, or damaged.
        QuantizationError: a weight or the calibration data cannot be quantized.
        OutputError: the output is not empty, or cannot be written.
    """
    AtomicDirectory(out)  # a taken target is refused before the long reading
    zeros = choose_zero_points(format, zero_points)
    if zeros == "integer" and offsets_at == "minimum":
        raise ConfigError(
            "offsets_at 'minimum' needs real-valued offsets: with integer zero-points (zero_points "
            f"'integer', format {format!r}) the minimum is a multiple of the scale, in general no "
            "fp16 number. Leave out one of the two"
        )
    if method == "rtn":
        check_data_free(calibration, desc_act)
    if desc_act and ordering == "none":
        raise ConfigError(
            "desc_act rounds inputs by size, ordering 'none' as they come: leave out one of the two"
        )
    settings = GPTQSettings(ordering="act" if desc_act else ordering, damp=damp, mse=mse)
    device = usable_device(device)
    config = QALoRAQuantConfig(
        bits=bits,
        group_size=group_size,
        desc_act=desc_act,
        offsets_dtype="float32" if zeros == "integer" else "float16",
        offsets_at=offsets_at,
        modules_to_not_convert=modules_to_not_convert,
        dynamic=dynamic or {},
        method=method,
    )
    with _on_disk(model, out, tokenizer, revision) as directory:
        source = ModelSource(directory, trust_remote_code)
        specs = choose_layers(source, config)
        if format != "qalora":
            format_named("gptq").module("write").check_specs(specs, format, config)
        windows = None
        if method == "gptq":
            length = fitting_length(source.model.config, seq_len)
            if tokenizer is None and not isinstance(calibration, torch.Tensor | None):
                tokenizer = AutoTokenizer.from_pretrained(
                    directory, trust_remote_code=trust_remote_code
                )
            windows = calibration_windows(
                calibration, tokenizer, samples=samples, seq_len=length, seed=seed
            )
            if len(windows) < samples:
                log.warning("calibration: text for %d of %d samples only", len(windows), samples)
        name = str(model) if isinstance(model, str) and directory != Path(model) else directory.name
        config.base = _describe(name, zeros, settings, windows, seed)
        job = _Job(
            source=source,
            config=config,
            specs=specs,
            settings=settings,
            integer_zeros=zeros == "integer",
            windows=windows,
            dtype=dtype or compute_dtype(source.model, device),
            device=device,
            resumable=not isinstance(model, PreTrainedModel),
            progress=progress,
        )
        return job.run(Path(out)) if format == "qalora" else job.run_stock(Path(out), format)


@contextmanager
def _on_disk(
    model: str | Path | PreTrainedModel, out: str | Path, tokenizer: Any, revision: str | None
) -> Iterator[Path]:
    """The model's directory; a model in memory is saved beside its output for as long."""
    if not isinstance(model, PreTrainedModel):
        yield resolve_model_dir(model, revision)
        return
    parent = AtomicDirectory(out).target.parent
    parent.mkdir(parents=True, exist_ok=True)
    name = Path(model.name_or_path).name or type(model).__name__
    with tempfile.TemporaryDirectory(dir=parent, prefix=".qalora-source-") as temporary:
        directory = Path(temporary) / name
        model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        yield directory


def _describe(
    name: str,
    zero_points: str,
    settings: GPTQSettings,
    windows: torch.Tensor | None,
    seed: int,
) -> dict[str, Any]:
    """The record of where the integers came from."""
    made: dict[str, Any] = {"name_or_path": name, "zero_points": zero_points}
    if windows is not None:
        made |= dataclasses.asdict(settings)
        made |= {"samples": len(windows), "seq_len": windows.shape[1], "seed": seed}
    return made


@dataclasses.dataclass
class _Job:
    """One model to quantize, all checks passed; see `quantize_model`."""

    source: ModelSource
    config: QALoRAQuantConfig
    specs: dict[str, QuantSpec]
    settings: GPTQSettings
    integer_zeros: bool
    windows: torch.Tensor | None
    dtype: torch.dtype
    device: torch.device
    resumable: bool
    progress: bool

    def tag(self) -> str:
        """What tells this work from any other."""
        settings = {
            "config": self.config.to_dict(),
            "dtype": str(self.dtype),
            "device": str(self.device),
        }
        return resume_tag(settings, self.source.reader, self.windows)

    def run(self, out: Path) -> QuantizeResult:
        """Write the directory."""
        target = AtomicDirectory(out, resume_tag=self.tag() if self.resumable else None)
        for path in leftovers(target.target, target.partial):
            log.warning(
                "%s: left by an interrupted run with other settings, data or source; starting "
                "over. Remove it if you do not want to finish that run.",
                path,
            )
        with target as partial:
            shards = BlockShards(partial, self.source, self.specs, self.config.desc_act)
            report = Report(partial)
            total = len(self.specs)
            with tqdm(
                total=total, unit="layer", desc="quantizing", disable=not self.progress
            ) as bar:
                self._write(shards, report, bar)
            shards.finish()
            copy_side_files(self.source.reader.directory, partial)
            config = self.config.to_dict()
            config["base"] = {**self.config.base, "fingerprint": shards.fingerprint()}
            final = {**self.source.reader.config, "quantization_config": config}
            write_json(partial / CONFIG_FILE, final)
        return dataclasses.replace(self.result_of(target.target), resumed=sum(shards.finished))

    def run_stock(self, out: Path, format: str) -> QuantizeResult:
        """Write a stock GPTQ directory, by way of one in our format."""
        target = AtomicDirectory(out).target
        # a hidden sibling, which a resumed run finds again
        first = target.with_name(f".{target.name}.qalora-{self.tag()}")
        result = self.result_of(first) if first.exists() else self.run(first)
        written = format_named("gptq").module("write").write_stock_gptq(first, target, format)
        shutil.rmtree(first)
        return dataclasses.replace(result, out=written)

    def result_of(self, out: Path) -> QuantizeResult:
        """The result that a finished directory holds."""
        kept = self.config.modules_to_not_convert or []
        return QuantizeResult(out, Report(out).layers, kept, 0)

    def _write(self, shards: BlockShards, report: Report, bar: tqdm) -> None:
        shards.write_outside()
        walk = None
        if self.windows is not None and not all(shards.finished):
            walk = Walk(
                self.source,
                self.config,
                self.settings,
                self.integer_zeros,
                self.windows,
                self.dtype,
                self.device,
            )
        for index, finished in enumerate(shards.finished):
            layers = shards.layers(index)
            if walk is not None:
                walk.enter(index, frozenset(layers) if finished else frozenset())
            if not finished:
                solved = walk.solve(index, layers) if walk else self._data_free(layers)
                for _ in shards.write_block(index, solved, report):
                    bar.update()
            else:
                bar.update(len(layers))
                if walk is not None:
                    shards.restore(index, walk)
            if walk is not None:
                walk.leave(index)
            release_freed_memory()

    def _data_free(self, layers: list[str]) -> Solved:
        for layer in layers:
            spec = self.specs[layer]
            fitted = rtn(
                self.source.tensor(f"{layer}.weight").to(self.device),
                bits=spec.bits,
                group_size=spec.group_size,
                name=self.source.layer_name(layer),
                integer_zeros=self.integer_zeros,
                offsets_at=spec.offsets_at,
                search=self.settings.mse,
            )
            yield layer, fitted, None
