"""Write down what a model in memory was built on: for bases that were quantized while loading."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .checkpoint.base import open_quantized
from .checkpoint.reader import CONFIG_FILE, read_json, resolve_model_dir
from .errors import CheckpointError
from .merge import is_dense
from .sharding import gathered, is_sharded, plain_name


def quantized_base_on_disk(model: PeftModel) -> Path | None:
    """Directory of the quantized base that a model was loaded from.

    None where that directory holds a 16-bit model, which was quantized while it was loaded, or
    where there is no directory.
    """
    config = model.active_peft_config
    if not config.base_model_name_or_path:
        return None
    try:
        directory = resolve_model_dir(config.base_model_name_or_path, config.revision)
    except CheckpointError:
        return None
    return None if is_dense(directory) else directory


def save_base(model: PeftModel, directory: Path) -> None:
    """Write the quantized base of a model with adapters, as `save_pretrained` would without them.

    Args:
        model: with adapters on quantized layers.
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
        with _without_adapters(base), _as_on_disk(base):
            base.save_pretrained(directory)
    finally:
        for name, value in before.items():
            setattr(config, name, value)


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
    return directory if name == "default" else directory / name


def _quantize_again(base: PreTrainedModel, directory: Path, fingerprint: str) -> None:
    """Quantize the 16-bit model's files as `from_pretrained` did, tensor by tensor.

    The whole model is on no rank; its files are on disk. The fingerprint proves that the integers
    are the same.
    """
    from .quant.pipeline import quantize_model

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
    """Put the layers that adapters wrap back in their places, for a while."""
    wrappers: dict[str, nn.Module] = {}
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrappers[name] = module
    try:
        for name, module in wrappers.items():
            tuned = isinstance(module, BaseTunerLayer)
            plain = module.base_layer if tuned else module.original_module
            base.set_submodule(name, cast(nn.Module, plain))
        with torch.no_grad():
            yield
    finally:
        for name, module in wrappers.items():
            base.set_submodule(name, module)


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
