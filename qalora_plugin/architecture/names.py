"""The names of modules and tensors: a checkpoint's and a model's."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from .experts import find_experts, without_fusing


@dataclass(frozen=True)
class Places:
    """Where a tensor of a checkpoint goes in a model.

    Args:
        targets: names of parameters or buffers, which the model may have or not.
        is_converted: whether it is fused with others or split, instead of put there as it is.
    """

    targets: tuple[str, ...]
    is_converted: bool


class LayerNames:
    """The names that a model gives to a checkpoint's tensors, as transformers translates them.

    Attributes:
        are_converted: whether transformers also fuses or splits tensors of this architecture.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix: str = model.base_model_prefix
        self._state = model.state_dict()
        mapping = without_fusing(get_model_conversion_mapping(model), find_experts(model))
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.are_converted = len(self._renamings) < len(mapping)

    def parameter(self, name: str) -> str:
        """Return the name that the model gives to a tensor of the checkpoint."""
        if name in self._state:
            return name
        return rename_source_key(name, self._renamings, [], self._prefix, self._state)[0]

    def places(self, name: str) -> Places:
        """Return where transformers puts a tensor of the checkpoint."""
        state, pattern = self._state, None
        if name not in state:
            found, pattern = rename_source_key(
                name, self._renamings, self._converters, self._prefix, state
            )
        if pattern is None:
            return Places((self.parameter(name),), is_converted=False)
        first, *others = self._converter(pattern).target_patterns
        return Places((found, *(found.replace(first, other) for other in others)), True)

    def _converter(self, pattern: str) -> WeightConverter:
        return next(entry for entry in self._converters if pattern in entry.source_patterns)

    def fused_part(self, name: str) -> tuple[str, int] | None:
        """Return which parameter transformers fuses a tensor of the checkpoint into, if it does.

        Returns:
            The parameter's name, and which part of it comes from such tensors: 0 for an expert's
            gate and 1 for its up; None where the tensor is not one of a list to put together.
        """
        found, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if pattern is None:
            return None
        converter = self._converter(pattern)
        operations = [type(operation) for operation in converter.operations]
        if operations not in ([MergeModulelist], [MergeModulelist, Concatenate]):
            return None
        return found, converter.source_patterns.index(pattern)

    def expert_projections(self) -> list[str]:
        """Return what files call the projections that transformers fuses, such as "w1"."""
        patterns = [p for entry in self._converters for p in entry.source_patterns]
        found = (re.search(r"\.\*\.(\w+)\.weight$", pattern) for pattern in patterns)
        return [match[1] for match in found if match]

    def unknown(self, name: str) -> str:
        """Return the name by which transformers reports a tensor that the model does not have."""
        return rename_source_key(name, self._renamings, [])[0]

    def has(self, name: str) -> bool:
        """Say whether the model has a parameter or buffer of this name."""
        return name in self._state

    def stored(self, names: Iterable[str]) -> dict[str, str]:
        """Return which of a checkpoint's names each of the model's tensors has that it stores."""
        found = {self.parameter(name): name for name in names}
        return {name: stored for name, stored in found.items() if self.has(name)}
