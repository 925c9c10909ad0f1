"""Write to disk what a training holds in memory: the adapter, and a base quantized on loading."""

import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..checkpoint.checkpoint import open_quantized
from ..checkpoint.kind import find_kind, find_model
from ..distributed.ranks import rank
from ..distributed.sharding import gathered, is_sharded, plain_name
from ..errors import CheckpointError, ConfigError, printable
from ..files.atomic import saved_by_others
from ..files.hub import resolve_model_dir
from ..files.json import read_json, write_json
from ..files.names import CONFIG_FILE
from ..layers.sharded import ShardedQuantLinear
from ..tuner.layer import QALoRALinear
from ..tuner.names import PREFIX
from ..tuner.resuming import adapter_directory

_log = logging.getLogger(__name__)


def quantized_base_on_disk(model: PeftModel) -> Path | None:
    """Find the directory of the quantized base that a model was loaded from.

    Returns:
        The directory; None where there is none, where it holds a 16-bit model, which was quantized
        on loading, or where the files have something else merged into them than the model has.
    """
    config = model.active_peft_config
    if not config.base_model_name_or_path:
        return None
    try:
        directory = find_model(config.base_model_name_or_path, config.revision)
    except CheckpointError:
        return None
    if find_kind(directory).is_16_bit:
        return None
    if open_quantized(directory).config.merged != config.base_merged:
        return None
    return directory


def save_base(model: PeftModel, directory: Path) -> None:
    """Write the quantized base of a model with adapters, as `save_pretrained` would without them.

    Args:
        model: with adapters on quantized layers, merged or not; it is left as it was.
        directory: where to write; of several processes one calls.

    Raises:
        CheckpointError: parameters are sharded, and the files give other integers by now.
    """
    base = model.get_base_model()
    if _is_quantized_again(base):
        _quantize_again(base, directory, model.active_peft_config.fingerprint)
        return
    with ExitStack() as undo, torch.no_grad():
        _remove_adapters(base, undo)
        _narrow_to_dtype_on_disk(base, undo)
        _set(undo, base.config, "dtype", base.config.dtype)  # save_pretrained changes it
        if getattr(base.config, "use_cache", None) is not None:
            # TRL and the Trainer switch it off while they train
            _set(undo, base.config, "use_cache", True)
        generation = getattr(base, "generation_config", None)
        if generation is not None:  # it may be one that save_pretrained refuses
            _set(undo, base, "generation_config", type(generation)())
        with saved_by_others(directory):
            base.save_pretrained(directory)
    write_generation_config(base, directory)


def check_savable(model: PeftModel) -> None:
    """Refuse to train on a base that `save_base` could not write as it is.

    Raises:
        ConfigError: it was quantized while it loaded, is sharded, and its scales or offsets are in
            another dtype than those that quantizing it again gives.
    """
    base = model.get_base_model()
    if quantized_base_on_disk(model) is not None or not _is_quantized_again(base):
        return
    stored = base.config.quantization_config
    for name in ("scales_dtype", "offsets_dtype"):
        if getattr(stored, name) != "float16":
            raise ConfigError(
                f"quantization_config: {name}: expected 'float16' in a base that was quantized "
                f"while it loaded and is sharded (ZeRO-3, FSDP), found {getattr(stored, name)!r}: "
                "the merge quantizes it again, and has no other. Leave it out, or train on a base "
                "that `qalora quantize` wrote"
            )


def _is_quantized_again(base: nn.Module) -> bool:
    """Say whether no process holds the layers of a base so that they could be written."""
    made_for_it = any(isinstance(module, ShardedQuantLinear) for module in base.modules())
    return made_for_it or any(is_sharded(parameter) for parameter in base.parameters())


def write_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Write generation_config.json, also one that transformers loads but refuses to save.

    An example that came with a base is {"temperature": 0.6, "do_sample": false}.
    """
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    if generation is None:
        return
    try:
        generation.save_pretrained(directory)
    except ValueError as error:
        said = printable(str(error))
        _log.warning("%s: as inconsistent as the base's: %s", GENERATION_CONFIG_NAME, said)
        generation.to_json_file(directory / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


def write_head_config(model: PreTrainedModel, directory: Path) -> None:
    """Add to config.json what a classifier was trained with and its base does not know.

    These are the names of labels, the kind of problem, and the padding token.
    """
    if not hasattr(model, "num_labels"):
        return
    path, trained = directory / CONFIG_FILE, model.config.to_dict()
    config = read_json(path)
    for key in ("id2label", "label2id", "problem_type", "pad_token_id"):
        if trained.get(key) is not None:
            config[key] = trained[key]
    write_json(path, config)


def save_adapter(model: PeftModel, directory: Path, name: str) -> Path:
    """Write an adapter, on rank 0; where parameters are sharded all ranks have to call.

    Returns:
        The directory that holds the adapter's files (see `adapter_directory`).
    """
    trained = {
        plain_name(n): p
        for n, p in model.named_parameters()
        if p.requires_grad or (PREFIX in n and f".{name}." in n)
    }
    state: dict[str, torch.Tensor] | None = None
    if any(is_sharded(parameter) for parameter in trained.values()):
        state = {}
        for key, parameter in trained.items():  # one by one: rank 0 alone keeps them
            (whole,) = gathered([parameter])
            if rank() == 0:
                state[key] = whole.cpu()
    if rank() == 0:
        with saved_by_others(directory):
            model.save_pretrained(str(directory), selected_adapters=[name], state_dict=state)
    return adapter_directory(name, directory)


def _quantize_again(base: PreTrainedModel, directory: Path, fingerprint: str) -> None:
    """Quantize the 16-bit model's files as `from_pretrained` did, since no rank holds all of it.

    The fingerprint shows that the integers are the same.
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
        revision=_commit(base),
    )
    found = open_quantized(directory).config.base["fingerprint"]
    if found != fingerprint:
        raise CheckpointError(
            f"{base.config.name_or_path}: quantized again, expected the fingerprint {fingerprint} "
            f"of the base that was trained, found {found}. Its files have changed, or another "
            "device rounds otherwise. Train on a base that `qalora quantize` wrote."
        )


def _commit(base: PreTrainedModel) -> str | None:
    """Return the commit of the Hub that a base was quantized from as it loaded, None of files."""
    revision: str | None = base.config.quantization_config.base.get("revision")
    return revision


def _set(undo: ExitStack, target: object, name: str, value: Any) -> None:
    """Set an attribute, and let `undo` set it back."""
    undo.callback(setattr, target, name, getattr(target, name))
    setattr(target, name, value)


def _remove_adapters(base: nn.Module, undo: ExitStack) -> None:
    """Put the layers that adapters wrap back in their places, with nothing merged."""
    for name, module in list(base.named_modules()):
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        tuned = isinstance(module, BaseTunerLayer)
        plain = module.base_layer if tuned else module.original_module
        undo.callback(base.set_submodule, name, module)
        base.set_submodule(name, cast(nn.Module, plain))
        if isinstance(module, QALoRALinear):
            scales, offsets = module.own_grid()
            _set(undo, module.base_layer, "scales", scales)
            _set(undo, module.base_layer, "offsets", offsets)


def _narrow_to_dtype_on_disk(base: PreTrainedModel, undo: ExitStack) -> None:
    """Convert frozen fp32 parameters to the 16-bit dtype that they were loaded from.

    TRL loads in fp32 by default: without this, embeddings would take twice their room.
    """
    try:
        directory = resolve_model_dir(base.config.name_or_path, _commit(base))
        config = read_json(directory / CONFIG_FILE)
    except CheckpointError:
        return
    name = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None:
        return
    for parameter in base.parameters():
        if parameter.dtype == torch.float32:
            narrow = parameter.data.to(dtype)
            if torch.equal(narrow.float(), parameter.data):
                _set(undo, parameter, "data", narrow)
