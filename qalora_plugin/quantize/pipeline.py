"""Quantize a model block by block: one block in memory at a time, resumable after a kill."""

import ctypes
import dataclasses
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel

from qalora_kernels import QuantSpec

from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.format import format_named
from ..checkpoint.side_files import copy_side_files
from ..files.atomic import AtomicDirectory, ScratchDirectory
from ..files.hub import resolve_model_dir
from ..files.json import read_json, write_json
from ..files.names import CONFIG_FILE, REPORT_FILE
from .calibration import calibration_windows, fitting_length
from .options import QuantizeOptions, read_options, usable_device
from .shards import BlockShards
from .source import ModelSource, choose_layers
from .walk import Walk, round_layers

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class QuantizeResult:
    """The result of `quantize_model`.

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
    options: QuantizeOptions | None = None,
    **settings: Any,
) -> QuantizeResult:
    """Quantize the linear layers in a model's blocks and write the result as a checkpoint.

    Beside one block, only the calibration activations are in memory. A run that was killed goes on
    where it stopped when it is started again with the same arguments, and ends in the same bytes.

        quantize_model("org/model", "model-int4", calibration="train.jsonl", group_size=64)

    Args:
        model: directory or Hub id of a 16-bit model, or a model in memory (it is saved to a
            hidden directory beside `out` first, and not resumable).
        out: directory to make; it must not exist, or be empty.
        options: what to do; by default made of the keywords alone.
        settings: fields of `QuantizeOptions`, which replace those of `options`.

    Raises:
        ConfigError: an option is unknown, out of range, contradicts another, or does not fit the
            model.
        CheckpointError: the model is quantized already, incomplete, or damaged.
        QuantizationError: a weight or the calibration data cannot be quantized.
        OutputError: the output is not empty, or cannot be written.
    """
    AtomicDirectory(out)  # a taken target is refused before the long reading
    options = read_options(options, settings)
    device = usable_device(options.device)
    with _on_disk(model, out, options) as directory:
        source = ModelSource(directory, options.trust_remote_code, options.dtype, device)
        config = options.config()
        specs = choose_layers(source, config)
        modules = source.model.named_modules()
        linears = [name for name, module in modules if isinstance(module, torch.nn.Linear)]
        config.modules_to_not_convert = [name for name in linears if name not in specs]
        if options.format != "qalora":
            format_named("gptq").module("write").check_specs(specs, options.format, config)
        windows = _windows(source, options) if options.method == "gptq" else None
        name = str(model) if isinstance(model, str) and directory != Path(model) else directory.name
        config.base = _origin(name, options, windows)
        resumable = not isinstance(model, PreTrainedModel)
        job = _Job(source, config, specs, options, windows, resumable)
        return job.run(out) if options.format == "qalora" else job.run_stock(out)


@contextmanager
def _on_disk(
    model: str | Path | PreTrainedModel, out: str | Path, options: QuantizeOptions
) -> Iterator[Path]:
    """Give the model's directory; a model in memory is saved beside its output for as long."""
    if not isinstance(model, PreTrainedModel):
        yield resolve_model_dir(model, options.revision)
        return
    with ScratchDirectory(out) as scratch:
        directory = scratch / (Path(model.name_or_path).name or type(model).__name__)
        model.save_pretrained(directory)
        if options.tokenizer is not None:
            options.tokenizer.save_pretrained(directory)
        yield directory


def _windows(source: ModelSource, options: QuantizeOptions) -> torch.Tensor:
    """Return token ids int64 [samples, seq_len] to calibrate on."""
    assert options.calibration is not None
    length = fitting_length(source.model.config, options.seq_len)
    tokenizer = options.tokenizer
    if tokenizer is None and not isinstance(options.calibration, torch.Tensor):
        tokenizer = AutoTokenizer.from_pretrained(
            source.reader.directory, trust_remote_code=options.trust_remote_code
        )
    windows = calibration_windows(
        options.calibration, tokenizer, samples=options.samples, seq_len=length, seed=options.seed
    )
    if len(windows) < options.samples:
        log.warning("calibration: text for %d of %d samples only", len(windows), options.samples)
    return windows


def _origin(name: str, options: QuantizeOptions, windows: torch.Tensor | None) -> dict[str, Any]:
    """Return the checkpoint's record of where its integers came from."""
    zeros = "integer" if options.integer_zeros else "real"
    made: dict[str, Any] = {"name_or_path": name, "zero_points": zeros}
    if windows is not None:
        made |= dataclasses.asdict(options.solver)
        made |= {"samples": len(windows), "seq_len": windows.shape[1], "seed": options.seed}
    return made


@dataclasses.dataclass(frozen=True)
class _Job:
    """One model to quantize, all checks passed; see `quantize_model`."""

    source: ModelSource
    config: QALoRAQuantConfig
    specs: dict[str, QuantSpec]
    options: QuantizeOptions
    windows: torch.Tensor | None
    resumable: bool

    def tag(self) -> str:
        """Return what tells this work from any other."""
        settings = {
            "config": self.config.to_dict(),
            "solver": dataclasses.asdict(self.options.solver),
            "dtype": str(self.source.dtype),
            "device": str(self.source.device),
        }
        data = b"" if self.windows is None else self.windows.numpy().tobytes()
        versions = [torch.__version__, transformers.__version__]
        return self.source.reader.digest(data, settings=settings, versions=versions)[:16]

    def run(self, out: str | Path) -> QuantizeResult:
        """Write a directory in our format."""
        target = AtomicDirectory(out, resume_tag=self.tag() if self.resumable else None)
        for path in target.unfinished():
            log.warning(
                "%s: left by an interrupted run with other settings, data or source; starting "
                "over. Remove it if you do not want to finish that run.",
                path,
            )
        with target as partial:
            shards = BlockShards(partial, self.source, self.specs, self.config.desc_act)
            self._write(shards)
            shards.writer.finish()
            copy_side_files(self.source.reader.directory, partial)
            config = self.config.to_dict()
            config["base"] = {**self.config.base, "fingerprint": shards.fingerprint()}
            final = {**self.source.reader.config, "quantization_config": config}
            write_json(partial / CONFIG_FILE, final)
        return dataclasses.replace(self._result(target.target), resumed=sum(shards.finished))

    def run_stock(self, out: str | Path) -> QuantizeResult:
        """Write a stock GPTQ directory, by way of one in our format."""
        target = AtomicDirectory(out).target
        # a hidden sibling, which a resumed run finds again
        first = target.with_name(f".{target.name}.qalora-{self.tag()}")
        result = self._result(first) if first.exists() else self.run(first)
        module = format_named("gptq").module("write")
        written = module.write_stock_gptq(first, target, self.options.format)
        shutil.rmtree(first)
        return dataclasses.replace(result, out=written)

    def _result(self, out: Path) -> QuantizeResult:
        """Return the result that a finished directory holds."""
        layers = read_json(out / REPORT_FILE)["layers"]
        return QuantizeResult(out, layers, self.config.modules_to_not_convert or [], 0)

    def _write(self, shards: BlockShards) -> None:
        """Write the weights that are not there yet."""
        shards.write_outside()
        source, specs, options = self.source, self.specs, self.options
        walk = None
        if self.windows is not None and not all(shards.finished):
            walk = Walk(source, specs, options, self.windows)
        hidden = not options.progress
        with tqdm(total=len(specs), unit="layer", desc="quantizing", disable=hidden) as bar:
            for index, finished in enumerate(shards.finished):
                layers = shards.layers(index)
                if walk:
                    walk.enter(index, shards.read_block(index) if finished else ())
                if finished:
                    bar.update(len(layers))
                else:
                    free = round_layers(source, specs, options, layers)
                    for _ in shards.write_block(index, walk.solve(index, layers) if walk else free):
                        bar.update()
                if walk:
                    walk.leave(index)
                _release_freed_memory()


def _release_freed_memory() -> None:
    """Give freed memory back, of which glibc, unasked, keeps 1 GB of a 1.1B Llama."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
