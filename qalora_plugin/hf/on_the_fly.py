"""Quantize a 16-bit model while transformers loads it, one layer at a time."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from qalora_kernels import QuantSpec

from ..architecture.selection import (
    check_group_sizes,
    check_overrides,
    linears_in_towers,
    linears_to_quantize,
)
from ..checkpoint.fingerprint import combine, mark
from ..errors import ConfigError, QALoRAError
from ..files.hub import public_name
from ..layers.absent import mark_loaded
from ..layers.linear import QuantLinear
from ..layers.sharded import ShardedQuantLinear
from ..quantize.rtn import rtn
from .config import QALoRAQuantConfig
from .loading import check_finite
from .sharded_loading import finish_sharding, loads_sharded, shard


class LayerQuantizer:
    """The layers to quantize while a model loads, and what became of them.

    Attributes:
        specs: the grid of every layer to quantize, by name.
        config: what the model's config will say; where towers stay dense, it lists what does.
        error: the first error, kept because transformers would only log it.
    """

    def __init__(self, model: nn.Module, config: QALoRAQuantConfig) -> None:
        """Choose layers of a model without weights, and let their weights arrive in fp32.

        Raises:
            ConfigError: the model has no layer to quantize, a setting names none of them, or asks
                for what needs calibration data.
        """
        _check_data_free(config)
        linears = linears_to_quantize(model, config.modules_to_not_convert, asked=config.dynamic)
        self.config = config
        if linears_in_towers(model, config.dynamic):  # other engines ask the config
            plain = (name for name, m in model.named_modules() if isinstance(m, nn.Linear))
            dense = [name for name in plain if name not in linears]
            self.config = replace(config, modules_to_not_convert=dense)
        self._marks: list[str] = []  # for the fingerprint, where layers are sharded at once
        self.specs: dict[str, QuantSpec] = {}
        self.error: QALoRAError | None = None
        check_group_sizes(config.group_sizes, linears.values())
        for name, linear in linears.items():
            self.specs[name] = config.spec_for(name, linear.in_features, linear.out_features)
            # a checkpoint's tensor is cast to this dtype before it is quantized: not to bf16
            empty = torch.empty(linear.weight.shape, dtype=torch.float32, device="meta")
            linear.weight = nn.Parameter(empty, requires_grad=False)
        check_overrides(config.dynamic, self.specs)

    def quantize(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        """Replace the layer `name` of the model by its quantized form, unless one has failed."""
        if self.error is not None:
            return
        linear = cast(nn.Linear, model.get_submodule(name))
        try:
            layer = self._quantized(name, weight)
        except QALoRAError as error:
            self.error = error
            return
        layer.bias = linear.bias  # loaded already, or about to be
        model.set_submodule(name, layer)

    def _quantized(self, name: str, weight: torch.Tensor) -> QuantLinear:
        spec = self.specs[name]
        packed = rtn(weight, spec, name=name)
        if loads_sharded():
            self._marks.append(mark(name, packed.qweight))
            layer: QuantLinear = shard(ShardedQuantLinear.from_packed(packed))
        else:
            layer = QuantLinear.from_packed(packed)
        mark_loaded(layer)
        return layer

    def finish(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """Complete the model, and let the config say where its integers came from.

        Layers that no tensor came for (new heads) get the model's dtype again.

        Raises:
            QALoRAError: a layer could not be quantized.
        """
        if self.error is not None:
            raise self.error
        for name in self.specs:
            module = model.get_submodule(name)
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.to(dtype))
        check_finite(model, str(getattr(model.config, "name_or_path", "")))
        base = self.config.base
        if self._marks:
            base["fingerprint"] = combine(self._marks)
        finish_sharding(model)
        base.setdefault("name_or_path", public_name(getattr(model.config, "name_or_path", "")))


def _check_data_free(config: QALoRAQuantConfig) -> None:
    if config.desc_act:
        asked, switch = "desc_act orders inputs by", " --desc-act"
    elif config.method != "rtn":
        asked, switch = f"method {config.method!r} needs", ""
    else:
        return
    raise ConfigError(
        f"quantization_config: {asked} calibration data, and there is none while a model loads. "
        "Leave it out, or quantize with `qalora quantize MODEL --out DIR --calibration "
        f"FILE{switch}` and load the result without quantization_config."
    )


class QuantizeOnLoad(ConversionOps):
    """transformers' loading step for one weight: quantize it, keep nothing else of it."""

    def __init__(self, layers: LayerQuantizer) -> None:
        self._layers = layers

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        model: nn.Module,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Quantize the weights among `input_dict` {name: tensor or [tensor]}; pass the rest on."""
        rest = {}
        for key, value in input_dict.items():
            name = key.removesuffix(".weight")
            if name not in self._layers.specs:
                rest[key] = value
                continue
            if missing_keys is not None:
                missing_keys.discard(key)
            self._layers.quantize(model, name, value[0] if isinstance(value, list) else value)
        return rest
