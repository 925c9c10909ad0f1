"""Write down what a model in memory was built on: for bases that were quantized while loading."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..checkpoint.checkpoint import open_quantized
from ..distributed.sharding import gathered, is_sharded, plain_name
from ..errors import CheckpointError
from ..files.hub import resolve_model_dir
from ..files.json import read_json, write_json
from ..files.names import CONFIG_FILE
from ..merge.adapter import is_dense
from ..tuner.layer import QALoRALinear

_log = logging.getLogger(__name__)


def quantized_base_on_disk(model: PeftModel) -> Path | None:
    """Directory of the quantized base that a model was loaded from.

    None where that directory holds a 16-bit model, which was quantized while it was loaded, where
    something else is merged into it than into the model, or where there is no directory.
    """
    config = model.active_peft_config
    if not config.base_model_name_or_path:
        return None
    try:
        directory = resolve_model_dir(config.base_model_name_or_path, config.revision)
    except CheckpointError:
        return None
    if is_dense(directory) or open_quantized(directory).config.merged != config.base_merged:
        return None
    return directory


def save_base(model: PeftModel, directory: Path) -> None:
    """Write the quantized base of a model with adapters, as `save_pretrained` would without them.

    Args:
        model: with adapters on quantized layers, merged or not.
        directory: where to write; of several processes one calls.

    Raises:
        CheckpointError: parameters are sharded, and the files give other integers by now.
    """
    base = model.get_base_model()
    if any(is_sharded(parameter) for parameter in base.parameters()):
        _quantize_again(base, directory, model.active_peft_config.fingerprint)
        return
    config = base.config
    before = {name: getattr(config, name, None) for name in ("use_cache", "dtype")}
    if before["use_cache"] is not None:
        config.use_cache = True  # TRL and the Trainer switch it off while they train
    try:
        with _without_adapters(base), _as_on_disk(base), _default_generation_config(base):
            base.save_pretrained(directory)
    finally:
        for name, value in before.items():
            setattr(config, name, value)
    write_generation_config(base, directory)


def write_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Write generation_config.json, also one that transformers loads but refuses to save.

    Such as {"temperature": 0.6, "do_sample": false}; it has come with the base.
    """
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.save_pretrained(directory)
    except ValueError as error:
        _log.warning("%s: as inconsistent as the base's: %s", GENERATION_CONFIG_NAME, error)
        generation.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def write_head_config(model: PreTrainedModel, directory: Path) -> None:
    """Carry what a classification model was trained with, and its base does not say, into
    config.json: names of labels, kind of problem, padding token."""
    if not hasattr(model, "num_labels"):
        return
    path, trained = directory / CONFIG_FILE, model.config.to_dict()
    config = read_json(path)
    for key in ("id2label", "label2id", "problem_type", "pad_token_id"):
        if trained.get(key) is not None:
            config[key] = trained[key]
    write_json(path, config)


def save_adapter(model: PeftModel, directory: Path, *, is_main_process: bool = True) -> Path:
    """Write the active adapter; returns the directory that holds its files.

    Args:
        model: with adapters.
        directory: where to write; an adapter that is not called "default" goes below it.
        is_main_process: whether this process writes; where parameters are sharded (ZeRO-3, FSDP)
            all processes have to call.
    """
    name = model.active_adapter
    trained = {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    state: dict[str, torch.Tensor] | None = None
    if any(is_sharded(parameter) for parameter in trained.values()):
        state = {}
        for key, parameter in trained.items():  # one by one: the main process alone keeps them
            (whole,) = gathered([parameter])
            if is_main_process:
                state[key] = whole.cpu()
    if is_main_process:
        model.save_pretrained(str(directory), selected_adapters=[name], state_dict=state)
    return adapter_directory(model, directory)


def adapter_directory(model: PeftModel, directory: Path) -> Path:
    """Where PEFT's `save_pretrained(directory)` puts the active adapter: below it, unless the
    adapter is called "default"."""
    name = model.active_adapter
    return directory if name == "default" else directory / name


def _quantize_again(base: PreTrainedModel, directory: Path, fingerprint: str) -> None:
    """Quantize the 16-bit model's files as `from_pretrained` did, tensor by tensor.

    The whole model is on no rank; its files are on disk. The fingerprint proves that the integers
    are the same.
    """
    from ..quantize.pipeline import quantize_model

    stored = base.config.quantization_config
    quantize_model(
        base.config.name_or_path,
        directory,
        bits=stored.bits,
        group_size=stored.group_size,
        method="rtn",
        offsets_at=stored.offsets_at,
        dynamic=stored.dynamic,
        modules_to_not_convert=stored.modules_to_not_convert,
    )
    found = open_quantized(directory).config.base["fingerprint"]
    if found != fingerprint:
        raise CheckpointError(
            f"{base.config.name_or_path}: quantized again it has the fingerprint {found}, the base "
            f"that was trained {fingerprint}: its files have changed, or another "
            "device rounds otherwise. Train on a base that `qalora quantize` wrote."
        )


@contextmanager
def _without_adapters(base: nn.Module) -> Iterator[None]:
    """Put the layers that adapters wrap back in their places, with nothing merged, for a while."""
    unmerged = ExitStack()
    wrappers: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrappers[name] = module
    try:
        for name, module in wrappers.items():
            tuned = isinstance(module, BaseTunerLayer)
            plain = module.base_layer if tuned else module.original_module
            base.set_submodule(name, cast(nn.Module, plain))
            if isinstance(module, QALoRALinear):
                unmerged.enter_context(module.own_grid())
        with torch.no_grad():
            yield
    finally:
        unmerged.close()
        for name, module in wrappers.items():
            base.set_submodule(name, module)


@contextmanager
def _default_generation_config(base: PreTrainedModel) -> Iterator[None]:
    """Have `save_pretrained` write a default, for a while: it may refuse the model's."""
    before = getattr(base, "generation_config", None)
    if before is None:
        yield
        return
    base.generation_config = type(before)()
    try:
        yield
    finally:
        base.generation_config = before


@contextmanager
def _as_on_disk(base: PreTrainedModel) -> Iterator[None]:
    """Hold frozen fp32 parameters in the 16-bit dtype that they were loaded from, for a while.

    TRL loads in fp32 by default: without this, embeddings would take twice their room.
    """
    dtype = _dtype_on_disk(base.config.name_or_path)
    before: dict[nn.Parameter, torch.Tensor] = {}
    for parameter in base.parameters():
        if dtype is None or parameter.dtype != torch.float32 or hasattr(parameter, "ds_id"):
            continue
        narrow = parameter.data.to(dtype)
        if torch.equal(narrow.float(), parameter.data):
            before[parameter] = parameter.data
            parameter.data = narrow
    try:
        yield
    finally:
        for parameter, data in before.items():
            parameter.data = data


def _dtype_on_disk(name: str) -> torch.dtype | None:
    try:
        config = read_json(resolve_model_dir(name) / CONFIG_FILE)
    except CheckpointError:
        return None
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(dtype))
