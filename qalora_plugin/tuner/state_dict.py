"""Check a state dict before it is loaded into a model that carries adapters.

PEFT loads adapters with strict=False and only warns: a layer whose key is missing would silently
keep its initial A and B.
"""

from collections.abc import Mapping

import torch

from ..errors import AdapterError

Tensors = Mapping[str, torch.Tensor]


def check_state_dict(found: Tensors, adapters: Mapping[str, Tensors], known: set[str]) -> None:
    """Check an adapter's state dict, the whole model's, or the base's alone.

    Of the base's alone nothing is asked: torch refuses it itself unless strict=False.

    Args:
        found: the tensors to load; here and below the keys are as `plain_name` makes them.
        adapters: the matrices in the model by adapter name and key.
        known: keys of all parameters and buffers of the model.

    Raises:
        AdapterError: an adapter is incomplete, a shape is wrong, or a key belongs to nothing.
    """
    # PEFT also saves resized embeddings under the wrapper's name, without the adapter's
    wrappers = [f".modules_to_save.{name}." for name in adapters]
    repeated = {k.replace(w, ".modules_to_save.") for k in found for w in wrappers if w in k}
    unexpected = sorted(found.keys() - known - repeated)
    if unexpected:
        raise AdapterError(
            f"adapter: unexpected key {unexpected[0]} ({len(unexpected)} in all): the model "
            "has no such tensor. Load the adapter that belongs to this model and config"
        )
    loaded = {name: own for name, own in adapters.items() if not own.keys().isdisjoint(found)}
    if not loaded and not any(".base_layer." in key for key in found):  # which adapters have not
        example = next((key for own in adapters.values() for key in own), "none")
        raise AdapterError(
            f"adapter: missing every key of {sorted(adapters)}: expected tensors such as "
            f"{example}, found {len(found)} others. Was the adapter saved completely?"
        )
    for name, own in loaded.items():
        missing = sorted(own.keys() - found.keys())
        if missing:
            raise AdapterError(
                f"adapter {name!r}: missing key {missing[0]} ({len(missing)} of {len(own)}): "
                "the file is incomplete, or was trained with other target_modules or adapt"
            )
        for key, weight in own.items():
            if weight.dim() == 2 and found[key].shape != weight.shape:
                raise AdapterError(
                    f"adapter {name!r}: {key}: expected shape {tuple(weight.shape)}, found "
                    f"{tuple(found[key].shape)}: it was trained with another rank, or on "
                    "another base"
                )
