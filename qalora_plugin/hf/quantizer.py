"""The transformers quantizer "qalora": load, quantize while loading, and save.

Registered by `register()`, which `import qalora_plugin` calls. `from_pretrained` then reads our
checkpoints and stock GPTQ ones, and quantizes 16-bit ones; `save_pretrained` writes ours.
"""

import copy
import json
import os
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from qalora_kernels import store_offsets
from qalora_kernels.stored import GUARD, QUANT_METHOD, is_excluded

from ..architecture.experts import find_experts, without_fusing
from ..architecture.places import places_problem
from ..architecture.unfuse import split_experts, unfuse_experts
from ..checkpoint.checkpoint import QuantizedCheckpoint, open_quantized
from ..checkpoint.layout import guard_tensor, quantized_layers
from ..checkpoint.source import describe_location
from ..errors import CheckpointError, ConfigError
from ..files.binding import bound_metadata
from ..files.inside import check_regular
from ..files.manifest import start_check
from ..files.names import CONFIG_FILE, INDEX_FILE
from ..files.reader import CheckpointReader
from ..files.safetensors import read_header
from ..layers.linear import QuantLinear
from ..layers.sharded import ShardedQuantLinear
from . import one_file, routing, stored_tensors
from .config import QALoRAQuantConfig
from .loading import StoredLayers
from .on_the_fly import LayerQuantizer, QuantizeOnLoad
from .sharded_loading import loads_sharded

_VARIANT = re.compile(r"model\.[^.]+\.safetensors")


class QALoRAQuantizer(HfQuantizer):
    """Loads quantized checkpoints as `QuantLinear` layers, and quantizes others while they load."""

    quantization_config: QALoRAQuantConfig

    def __init__(self, quantization_config: QALoRAQuantConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._layers: StoredLayers | LayerQuantizer | None = None
        self._check: Future[bool] | None = None
        self._dtype = torch.get_default_dtype()
        self._experts: list[str] = []

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse offloading to disk, which would bypass the layers.

        Raises:
            ConfigError: device_map names "disk".
        """
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError(
                "device_map: 'disk' is not supported for a quantized model. Use 'cpu' or a GPU."
            )

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if not checkpoint_files:
            raise ConfigError(
                "A quantized model is loaded from a directory or the Hub, not from a state_dict."
            )
        self._dtype = dtype or torch.get_default_dtype()
        files = [Path(file) for file in checkpoint_files]
        _check_place(files, model.config.name_or_path)
        checkpoint = self._open(files)
        if checkpoint is None:
            names = self._unfuse(model, files)
        else:
            unfuse_experts(model, checkpoint.weight_names, checkpoint.layers.__contains__)
        self._experts = list(find_experts(model))
        _check_dispatch(model, self._experts)
        if checkpoint is None:
            problem = places_problem(model, names, architectures=model.config.architectures)
            if problem is not None:
                raise CheckpointError(f"{files[0].parent}: {problem}.")
            self._layers = LayerQuantizer(model, self.quantization_config)
            self.quantization_config = self._layers.config
            base, place = self.quantization_config.base, describe_location(files[0])
            base.pop("revision", None)  # of another model
            if "revision" in place:  # these files may have to be quantized again
                base["revision"] = place["revision"]
            return
        directory = str(checkpoint.directory)
        routing.check_request(self.quantization_config, checkpoint.config, directory)
        # one object: loading may add the fingerprint
        checkpoint.config = self.quantization_config = QALoRAQuantConfig.of(checkpoint.config)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # once on each machine
            self._check = start_check(checkpoint.directory)
        self._layers = StoredLayers(model, checkpoint, pending=loads_sharded())
        stored_tensors.bring_state(model, checkpoint)

    def _unfuse(self, model: PreTrainedModel, files: list[Path]) -> list[str]:
        """Unfuse the experts of a 16-bit model to quantize; return the names of its tensors.

        Where the files hold them fused, transformers is brought their parts.
        """
        kept = self.quantization_config.modules_to_not_convert or ()
        names = stored = _tensor_names(files)
        reader = None

        def is_chosen(layer: str) -> bool:
            return not is_excluded(layer, kept)

        if not _is_variant(files):
            with torch.device("cpu"):
                reader = CheckpointReader(files[0].parent)
            reader.tensors = split_experts(model, reader.tensors, is_chosen)
            names = list(reader.tensors)
        unfuse_experts(model, names, is_chosen)
        if names == stored or not find_experts(model):
            return stored
        assert reader is not None
        stored_tensors.bring_tensors(model, reader, names)
        return names

    def _open(self, files: list[Path]) -> QuantizedCheckpoint | None:
        """Open the directory of these files, or return None if they are to be quantized."""
        with torch.device("cpu"):  # this is called under the meta device
            # an AutoGPTQ directory may have quantize_config.json only, which transformers overlooks
            if self.pre_quantized or quantized_layers(_tensor_names(files)):
                self.pre_quantized: bool = True
                return open_quantized(files[0].parent, check_hashes=False)  # `_check` does
        return None

    def update_weight_conversions(self, weight_conversions: list[Any], *args: Any) -> list[Any]:
        """Return transformers' conversions less those that fuse the experts that we unfused."""
        return without_fusing(weight_conversions, self._experts)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        """Say whether this weight of a 16-bit checkpoint is quantized when it arrives."""
        name, _, part = param_name.rpartition(".")
        quantizes = isinstance(self._layers, LayerQuantizer) and name in self._layers.specs
        return quantizes and part == "weight"

    def get_quantize_ops(self) -> QuantizeOnLoad:
        """Return the loading step for one such weight."""
        assert isinstance(self._layers, LayerQuantizer)
        return QuantizeOnLoad(self._layers)

    def param_element_size(
        self, model: PreTrainedModel, param_name: str, param: torch.Tensor
    ) -> float:
        """Return the bytes that an element takes once loaded, for device_map="auto"."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        assert isinstance(self._layers, LayerQuantizer)
        spec = self._layers.specs[param_name.removesuffix(".weight")]
        grid = spec.scales_dtype.itemsize + spec.offsets_dtype.itemsize
        return spec.bits / 8 + grid / spec.group_size

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        assert self._layers is not None
        self._layers.finish(model, self._dtype)
        self._layers = None
        if self._check is not None:
            self._check.result()
            self._check = None
        _set_weight_dtypes(model, self._dtype)
        model.config.quantization_config = self.quantization_config
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return the model's state dict in the checkpoint's dtypes, with each layer's guard.

        The metadata bind the tensors to the config.json that transformers writes beside them.

        Raises:
            CheckpointError: a layer is wrapped by an adapter, or sharded away (ZeRO-3).
        """
        state = model.state_dict()
        adapter_alone = getattr(model, "_hf_peft_config_loaded", False)
        for name, module in model.named_modules():
            wrapped = name.endswith(".base_layer")
            if not isinstance(module, QuantLinear) or (wrapped and adapter_alone):
                continue
            _check_savable(name, module)
            state[f"{name}.offsets"] = store_offsets(module.offsets, module.scales, module.spec)
            state[f"{name}.{GUARD}"] = guard_tensor(module.in_features)
        if adapter_alone:
            return state, {}
        return state, bound_metadata(_config_on_disk(model), CONFIG_FILE)

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantLinear):
                linear = nn.Linear(module.in_features, module.out_features, False, device="meta")
                dense = module.packed.dequantize(dtype or torch.float32).t().contiguous()
                linear.weight = nn.Parameter(dense)
                linear.bias = module.bias  # type: ignore[assignment]
                model.set_submodule(name, linear.train(module.training))
        for name, experts in find_experts(model).items():
            model.set_submodule(name, experts.fuse())
            model.__dict__.pop("_weight_conversions", None)  # those of the unfused experts
        return model

    def is_serializable(self) -> bool:
        """Return True: save_pretrained writes our format."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters and biases can be trained; the integers are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: the operators have fake kernels."""
        return True


def _check_dispatch(model: PreTrainedModel, experts: list[str]) -> None:
    """Refuse a way to compute experts that ours do not have.

    Raises:
        ConfigError: names it.
    """
    asked = getattr(model.config, "_experts_implementation", None)
    if experts and asked not in (None, "eager", "grouped_mm"):  # the latter is the default
        raise ConfigError(
            f"experts_implementation {asked!r} computes with 16-bit experts; quantized ones are "
            "called one by one. Leave it out, or set it to 'eager'."
        )


def _check_place(files: list[Path], name_or_path: str) -> None:
    """Refuse files that an index names outside of the model's directory.

    Raises:
        CheckpointError: names one.
    """
    given = Path(name_or_path)
    expected = given if given.is_dir() else files[0].parent
    for file in files:
        # without following links, which are those of the Hub's cache
        if ".." in file.parts[len(expected.parts) :] or not file.is_relative_to(expected):
            raise CheckpointError(
                f"{file}: {INDEX_FILE} names it, and it is not in {expected}. Do not use this "
                "checkpoint unless you trust its origin."
            )
        if file.exists():
            check_regular(file)


def _config_on_disk(model: PreTrainedModel) -> dict[str, Any]:
    """Return the content of the config.json that save_pretrained is about to write."""
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    written: dict[str, Any] = json.loads(config.to_json_string())
    return written


def _is_variant(files: list[Path]) -> bool:
    """Say whether the files are those of from_pretrained(variant="fp16")."""
    return all(_VARIANT.fullmatch(path.name) for path in files)


def _tensor_names(files: list[Path]) -> list[str]:
    """Return the names of the tensors in the files of one directory that transformers will read."""
    if _is_variant(files):
        return [name for path in files for name in read_header(path)[0]]
    return list(CheckpointReader(files[0].parent).tensors)


def _set_weight_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Have quantized layers answer with the dtype of the dense ones, as T5's forward asks."""
    plan = model._get_dtype_plan(dtype)
    kept, pattern_of, _ = build_glob_alternation(list(plan))
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found = kept.search(f"{name}.weight") if plan else None
            module.weight_dtype = plan[pattern_of[str(found.lastgroup)]] if found else dtype


def _check_savable(name: str, module: QuantLinear) -> None:
    if name.endswith(".base_layer"):
        raise CheckpointError(
            f"{name} carries an adapter. Save the adapter with PeftModel.save_pretrained, "
            "or merge_and_unload() before saving the model."
        )
    if isinstance(module, ShardedQuantLinear) or module.qweight.dim() != 2:
        raise CheckpointError(
            f"{name}.qweight is sharded (ZeRO-3, FSDP). Save with Trainer.save_model on "
            "all ranks, or merge from the saved adapter with `qalora merge`."
        )


def register() -> None:
    """Register the quantizer and its config with transformers; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(QALoRAQuantizer)
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(QALoRAQuantConfig)
    routing.install()
    stored_tensors.install()
    one_file.install()
