"""`QALoRAModel`: puts adapters on the quantized layers of a model, as PEFT's tuners do."""

import copy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..checkpoint.merged import MergedAdapter, merged_in_memory
from ..distributed.sharding import plain_name
from ..errors import AdapterError
from ..layers.linear import QuantLinear
from . import resuming
from .config import PEFT_TYPE, QALoRAConfig
from .layer import BASE, QALoRALinear
from .names import PREFIX
from .selecting import select
from .state_dict import check_state_dict
from .targets import BaseIdentity, base_identity, check_base, quantization_config, resolve_targets

_HEADS_ADDED_LATER = (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


class QALoRAModel(BaseTuner):
    """A model whose quantized linear layers carry QA-LoRA adapters; see PEFT's `BaseTuner`."""

    prefix = PREFIX
    tuner_layer_cls = QALoRALinear
    target_module_mapping: dict[str, list[str]] = {}

    identity: BaseIdentity | None = None
    """Of the base; None before an adapter meets it."""
    resumed_from: Path | None = None
    """The checkpoint that the Trainer has loaded last."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter on every layer that its config targets.

        The config is copied first: one QALoRAConfig may serve several bases.

        Raises:
            ConfigError: see `targets.resolve_targets`.
            AdapterError: a loaded adapter belongs to another base.
        """
        if len(self.peft_config) > 1 or "transformers.trainer" in sys.modules:
            resuming.install()
        given = self.peft_config[adapter_name]
        if given.task_type in _HEADS_ADDED_LATER and given.modules_to_save is None:
            given.modules_to_save = []  # PEFT appends the head's name afterwards, to this list
        config = copy.copy(given)
        resolve_targets(config, model)
        if self.identity is None:
            self.identity = base_identity(model)
        check_base(config, self.identity)
        self.peft_config[adapter_name] = config
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        return select(vars(peft_config), key)  # PEFT's own cannot be stopped

    def _prepare_adapter_config(self, peft_config: QALoRAConfig, model_config: Any) -> QALoRAConfig:
        return peft_config  # target_modules is resolved already

    def _create_and_replace(
        self,
        peft_config: QALoRAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, QALoRALinear):
            target.update_layer(adapter_name, peft_config, current_key)
        else:  # a QuantLinear: `resolve_targets` has refused the rest
            layer = QALoRALinear(cast(QuantLinear, target), adapter_name, peft_config, current_key)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's own moves .weight and .bias along, which a QuantLinear keeps to itself
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # A and B are fp32 in every mode, so that folding rounds once, to what is stored
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=True)

    def _layers(self) -> Iterator[tuple[str, QALoRALinear]]:
        for name, module in self.named_modules():
            if isinstance(module, QALoRALinear):
                yield name, module

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to the layers of a mixed batch; PEFT calls the model inside this."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names (a mixed batch) is for inference: call eval() first")
        unknown = set(names) - set(self.peft_config) - {BASE}
        if unknown:
            raise ValueError(
                f"adapter_names has {sorted(unknown)}; known are {sorted(self.peft_config)} "
                f"and {BASE!r}"
            )
        names = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]

        def add_names(module: nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
            return inputs, options | {"adapter_names": names}

        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, QALoRALinear | AuxiliaryTrainingWrapper):
                    hook = module.register_forward_pre_hook(add_names, with_kwargs=True)
                    hooks.enter_context(hook)
            yield

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; see PEFT's `BaseTuner`.

        Raises:
            AdapterError: the adapter is merged; nothing has changed.
        """
        # the next merge, from A and B anew, would drop it
        if any(adapter_name in layer.merged_adapters for _, layer in self._layers()):
            raise AdapterError(
                f"adapter {adapter_name!r} is merged and cannot be deleted: call unmerge_adapter() "
                "first, or merge_and_unload() to keep its change for good"
            )
        super().delete_adapter(adapter_name)

    def _check_merge(self, adapter_names: list[str] | None) -> None:
        # all layers before the first one changes: a merge that stops half-way helps nobody
        for name, layer in self._layers():
            layer.check_merge(adapter_names, name)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Fold adapters into the layers that they are on; `unmerge_adapter` undoes it.

        Arguments and errors are those of `QALoRALinear.merge`; no layer has changed on an error.
        """
        self._check_merge(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Return the plain model with the adapters folded in, which saves in our format.

        Arguments and errors are those of `merge_adapter`; `progressbar` shows one.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        adapters = self._merged_adapters(names)
        whole = self._saved_modules(adapters)
        self._check_merge(adapter_names)
        self._put(whole)
        return _recorded(super().merge_and_unload(progressbar, safe_merge, adapter_names), adapters)

    def unload(self) -> nn.Module:
        """Return the plain model, adapters removed.

        As in PEFT's LoRA, what `merge_adapter` has folded in stays, and the config's `merged` says
        so; `unmerge_adapter()` first gives the base, also where modules_to_save were trained.
        """
        adapters = self._merged_adapters([])
        self._put(self._saved_modules(adapters))
        return _recorded(super().unload(), adapters)

    def _saved_modules(self, adapters: list[MergedAdapter]) -> dict[str, nn.Module]:
        """Return what stands in the place of each of modules_to_save once these are merged.

        Raises:
            AdapterError: two of the adapters replace one module; nothing has changed.
        """
        # PEFT takes that of the active adapter, whichever are merged, and fails where it has none
        whole: dict[str, nn.Module] = {}
        for key, wrapper in self.model.named_modules(remove_duplicate=False):
            if not isinstance(wrapper, ModulesToSaveWrapper):
                continue
            held = [a.adapter for a in adapters if a.adapter in wrapper.modules_to_save]
            if len(held) > 1:
                raise AdapterError(
                    f"{key}: the adapters {held} each replace this module (modules_to_save), and "
                    "one alone can be merged: choose it with adapter_names"
                )
            whole[key] = wrapper.modules_to_save[held[0]] if held else wrapper.original_module
        return whole

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for key, module in modules.items():
            self.model.set_submodule(key, module)

    def _merged_adapters(self, names: list[str]) -> list[MergedAdapter]:
        """Describe the adapters that are merged already, and these."""
        merged = {name for _, layer in self._layers() for name in layer.merged_adapters}
        return [
            MergedAdapter(
                adapter=name,
                peft_type=PEFT_TYPE,
                convention=config.convention,
                adapt=config.adapt,
                r=config.r,
                lora_alpha=config.lora_alpha,
                modules_to_save=sorted(config.modules_to_save or []),
            )
            for name, config in self.peft_config.items()
            if name in merged or name in names
        ]

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        found = {plain_name(k): v for k, v in state_dict.items() if k.startswith(prefix)}
        parameters = self.named_parameters(remove_duplicate=False)  # tied ones have two names
        known = {plain_name(prefix + name) for name, _ in (*parameters, *self.named_buffers())}
        matrices: dict[str, dict[str, torch.Tensor]] = {name: {} for name in self.peft_config}
        for name, layer in self._layers():
            for adapter_name in layer.scaling:
                for attribute, weight in layer.matrices(adapter_name):
                    key = plain_name(f"{prefix}{name}.{attribute}.{adapter_name}.weight")
                    matrices[adapter_name][key] = weight
        check_state_dict(found, matrices, known)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _recorded(model: Any, adapters: list[MergedAdapter]) -> nn.Module:
    """Write into the model's config what was merged into it."""
    stored = quantization_config(model)
    if stored is not None and adapters:
        stored.merged = merged_in_memory(adapters, stored.merged)
        model.config.quantization_config = stored
    return model
