"""Quantize a model block by block: one block in memory at a time, resumable after a kill."""

import ctypes
import dataclasses
import logging
import shutil
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from qalora_kernels import QuantSpec

from .._version import __version__
from ..architecture.blocks import reads_text
from ..architecture.experts import Experts, is_fused
from ..checkpoint.config import QALoRAQuantConfig
from ..checkpoint.format import format_named
from ..checkpoint.kind import find_model
from ..checkpoint.side_files import copy_side_files, load_tokenizer
from ..errors import ConfigError
from ..files.atomic import AtomicDirectory, ScratchDirectory, replace_text, saved_by_others
from ..files.json import json_text, read_json, write_json
from ..files.names import CHOSEN_BITS_FILE, CONFIG_FILE, REFINE_STATE_FILE, REPORT_FILE
from ..files.progress import progress_meter
from .allocate import BitChooser, check_target, grids_by_layer
from .calibration import calibration_windows, check_token_ids, fitting_length
from .divergence import check_predicts
from .options import QuantizeOptions, read_options, usable_device
from .refine import Refiner, split_windows
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
        kept: linear modules, or whole `experts`, that stayed in 16 bits.
        resumed: blocks that an earlier, interrupted run had finished.
        experts: of a calibrated mixture: how many experts were "calibrated", and how many of these
            saw fewer tokens than they have inputs ("few_tokens"), and took all tokens instead.
        refined: where scales and offsets were trained, the settings of that, and the held-out KL
            divergence from the 16-bit model before and after, in nats a token.
    """

    out: Path
    layers: dict[str, dict[str, Any]]
    kept: list[str]
    resumed: int
    refined: dict[str, Any] | None = None
    experts: dict[str, int] | None = None


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
        config = options.config()
        source = ModelSource(
            directory,
            options.trust_remote_code,
            options.dtype,
            device,
            config.modules_to_not_convert or (),
        )
        specs = choose_layers(source, config)
        config.modules_to_not_convert = _in_16_bits(source.model, specs)
        if options.format != "qalora":
            format_named("gptq").module("write").check_specs(specs, options.format, config)
        if options.refine or options.bits == "auto":
            check_predicts(source.model)
        windows = _windows(source, options) if options.method == "gptq" else None
        name = str(model) if isinstance(model, str) and directory != Path(model) else directory.name
        config.base = _origin(name, options, windows)
        resumable = not isinstance(model, PreTrainedModel)
        job = _Job(source, config, specs, options, windows, resumable)
        if options.target_bits is not None:
            check_target(specs, job._settled(), options.target_bits)
        return job.run(out) if options.format == "qalora" else job.run_stock(out)


def _in_16_bits(model: PreTrainedModel, specs: Container[str]) -> list[str]:
    """Return what stays in 16 bits: linear layers, and experts by one name where all of them do."""
    kept: dict[str, None] = {}
    for name, module in model.named_modules():
        if is_fused(module):
            kept[name] = None
        elif isinstance(module, Experts):
            linears = [n for n, m in module.named_modules() if isinstance(m, torch.nn.Linear)]
            if not any(f"{name}.{linear}" in specs for linear in linears):
                kept[name] = None
        elif isinstance(module, torch.nn.Linear):
            owner = ".".join(name.split(".")[:-2])
            if name not in specs and owner not in kept:
                kept[name] = None
    return list(kept)


@contextmanager
def _on_disk(
    model: str | Path | PreTrainedModel, out: str | Path, options: QuantizeOptions
) -> Iterator[Path]:
    """Give the model's directory; a model in memory is saved beside its output for as long."""
    if isinstance(model, str | Path):
        yield find_model(model, options.revision)
        return
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(
            "model: expected a directory, a Hub id or a transformers model, found a "
            f"{type(model).__name__}. Of a PEFT model give merge_and_unload()"
        )
    reads_text = options.method == "gptq" and not isinstance(options.calibration, torch.Tensor)
    if reads_text and options.tokenizer is None:
        raise ConfigError(
            f"{type(model).__name__}: a model in memory brings no tokenizer for calibration text: "
            "pass tokenizer=, or token ids [samples, seq_len] as calibration"
        )
    with ScratchDirectory(out) as scratch:
        named = Path(model.name_or_path).resolve().name if model.name_or_path else ""
        directory = scratch / (named or type(model).__name__)
        with saved_by_others(directory):
            model.save_pretrained(directory)
            if options.tokenizer is not None:
                options.tokenizer.save_pretrained(directory)
        yield directory


def _windows(source: ModelSource, options: QuantizeOptions) -> torch.Tensor:
    """Return token ids int64 [samples, seq_len] to calibrate, and to refine, on."""
    assert options.calibration is not None
    if not reads_text(source.model):
        raise ConfigError(
            f"{type(source.model).__name__}: method 'gptq' calibrates on text, which this model "
            "does not read. Use method 'rtn'"
        )
    length = fitting_length(source.model.config, options.seq_len)
    tokenizer = options.tokenizer
    if tokenizer is None and not isinstance(options.calibration, torch.Tensor):
        tokenizer = load_tokenizer(source.reader.directory, options.trust_remote_code)
    windows = calibration_windows(
        options.calibration, tokenizer, samples=options.windows, seq_len=length, seed=options.seed
    )
    check_token_ids(windows, source.model)
    if options.refine:
        split_windows(windows)  # refuses a text that is too short, before it is quantized
    if len(windows) < options.samples:
        log.warning("calibration: text for %d of %d samples only", len(windows), options.samples)
    return windows


def _origin(name: str, options: QuantizeOptions, windows: torch.Tensor | None) -> dict[str, Any]:
    """Return the checkpoint's record of where its integers came from."""
    made: dict[str, Any] = {"name_or_path": name, "zero_points": options.zeros}
    if windows is not None:
        made |= dataclasses.asdict(options.solver)
        samples = len(_calibrating(windows, options))
        made |= {"samples": samples, "seq_len": windows.shape[1], "seed": options.seed}
    return made


def _calibrating(windows: torch.Tensor, options: QuantizeOptions) -> torch.Tensor:
    """Return the windows that GPTQ sees: the first ones, none of those that are held out."""
    return (split_windows(windows)[0] if options.refine else windows)[: options.samples]


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
        settings: dict[str, Any] = {
            "config": self.config.to_dict(),
            "solver": dataclasses.asdict(self.options.solver),
            "dtype": str(self.source.dtype),
            "device": str(self.source.device),
        }
        if self.options.refine:
            settings["refine"] = dataclasses.asdict(self.options.refining)
        if self.options.bits == "auto":
            settings["target_bits"] = self.options.target_bits
        data = b"" if self.windows is None else self.windows.numpy().tobytes()
        versions = [__version__, torch.__version__, transformers.__version__]
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
            job = self._with_chosen_bits(partial) if self.options.bits == "auto" else self
            resumed = job._fill(partial)
        return dataclasses.replace(job._result(target.target), resumed=resumed)

    def _fill(self, directory: Path) -> int:
        """Write all files; return the number of blocks that were there."""
        shards = BlockShards(directory, self.source, self.specs, self.config)
        self._write(shards)
        refined = self._refine(shards, directory) if self.options.refine else {}
        shards.writer.finish()
        copy_side_files(self.source.reader.directory, directory)
        config = self.config.to_dict()
        mark = {"fingerprint": shards.fingerprint()}
        config["base"] = {**self.config.base, **refined, **mark}
        final = {**self.source.reader.config, "quantization_config": config}
        write_json(directory / CONFIG_FILE, final)
        for name in (REFINE_STATE_FILE, CHOSEN_BITS_FILE):
            (directory / name).unlink(missing_ok=True)
        return sum(shards.finished)

    def _with_chosen_bits(self, directory: Path) -> "_Job":
        """Return the job with bits for every layer, as measured now or by an earlier run."""
        file = directory / CHOSEN_BITS_FILE
        if not file.exists():
            assert self.windows is not None
            chooser = BitChooser(self.source, self.specs, self.options, self.windows)
            specs, record = chooser.choose(self._settled())
            names = {self.source.layer_name(name): spec for name, spec in specs.items()}
            grid, dynamic = grids_by_layer(names)
            replace_text(file, json_text({**grid, "dynamic": dynamic, "record": record}))
        chosen = read_json(file)
        config = dataclasses.replace(
            self.config,
            bits=chosen["bits"],
            group_size=chosen["group_size"],
            dynamic=chosen["dynamic"],
            base={**self.config.base, "chosen_bits": chosen["record"]},
        )
        return dataclasses.replace(self, config=config, specs=choose_layers(self.source, config))

    def _settled(self) -> set[str]:
        """Return the layers whose bits `dynamic` gives."""
        other = dataclasses.replace(self.config, bits=3 if self.config.bits != 3 else 4)
        found = choose_layers(self.source, other)
        return {name for name, spec in self.specs.items() if found[name].bits == spec.bits}

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
        report = read_json(out / REPORT_FILE)
        kept = self.config.modules_to_not_convert or []
        found = report.get("refined"), report.get("experts")
        return QuantizeResult(out, report["layers"], kept, 0, *found)

    def _write(self, shards: BlockShards) -> None:
        """Write the weights that are not there yet."""
        shards.write_outside()
        source, specs, options = self.source, self.specs, self.options
        walk = None
        if self.windows is not None and not all(shards.finished):
            walk = Walk(source, specs, options, _calibrating(self.windows, options))
        hidden = not options.progress
        with progress_meter("quantizing", "layer", total=len(specs), disable=hidden) as bar:
            for index, finished in enumerate(shards.finished):
                layers = shards.layers(index)
                if walk:
                    walk.enter(index, shards.read_block(index) if finished else ())
                if finished:
                    bar.update(len(layers))
                else:
                    if walk:
                        walk.experts.clear()
                        solved, counts = walk.solve(index, layers), walk.experts
                    else:
                        solved, counts = round_layers(source, specs, options, layers), None
                    for _ in shards.write_block(index, solved, counts):
                        bar.update()
                if walk:
                    walk.leave(index)
                _release_freed_memory()

    def _refine(self, shards: BlockShards, directory: Path) -> dict[str, Any]:
        """Refine what is written; return the record of it."""
        options, windows = self.options, self.windows
        assert windows is not None
        blocks = range(len(shards.finished))
        layers = (layer for index in blocks for layer in shards.read_block(index))
        refiner = Refiner(self.source, layers, options.refining, options.zeros)
        record = refiner.run(windows, options.seed, directory, progress=options.progress)
        shards.rewrite(refiner.packed(), refiner.norms)
        shards.add_to_report(refined=record)
        return {"refined": record}


def _release_freed_memory() -> None:
    """Give freed memory back, of which glibc, unasked, keeps 1 GB of a 1.1B Llama."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
