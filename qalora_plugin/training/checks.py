"""Before a training: that what it is about to train is what a merge will write."""

from collections.abc import Collection, Set
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper

from ..checkpoint.checkpoint import open_quantized
from ..distributed.sharding import is_sharded, plain_name
from ..errors import ConfigError
from ..files.names import CONFIG_FILE
from ..tuner.config import PEFT_TYPE
from ..tuner.layer import QALoRALinear
from ..tuner.names import PREFIX
from .save import quantized_base_on_disk

_HEADS = ("classifier", "score", "qa_outputs")  # as PEFT calls them
# keys of config.json that loading and trainers set, and that change no logits of the merged model,
# or that a merge takes from the adapter
_SET_BY_TRAINERS = {
    "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "num_labels",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "problem_type", "quantization", "quantization_config", "return_dict", "router_aux_loss_coef",
    "transformers_version", "use_cache", "vocab_size",
}  # fmt: skip


def trained_adapter(model: Any) -> str:
    """Return the name of the adapter that a training changes and evaluates.

    Raises:
        ConfigError: there is no QALORA adapter, or nothing that is trained; it is more than one,
            is switched off, or is merged into the layers.
    """
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if kind != PEFT_TYPE:
        found = "no adapter" if kind is None else f"the PEFT method {kind.value}"
        raise ConfigError(
            f"MergeCallback: expected a model with a QALORA adapter, found {found}. "
            "Give SFTTrainer peft_config=QALoRAConfig(...)"
        )
    active = list(model.active_adapters)
    if active != [model.active_adapter]:
        raise ConfigError(
            f"MergeCallback: expected one active adapter, found {active} in the layers and "
            f"{model.active_adapter!r} in the model: one alone can be merged. Choose it with "
            "model.set_adapter(NAME) before training"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, QALoRALinear) and (layer.merged or layer.disable_adapters):
            state, way = "switched off in", "enable_adapter_layers"
            if layer.merged:
                state, way = "merged into", "unmerge_adapter"
            raise ConfigError(
                f"MergeCallback: the adapter is {state} {name}, and so is not trained. Call "
                f"model.{way}() before training"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "MergeCallback: no parameter is trainable: the adapter was loaded for inference. Load "
            "it with PeftModel.from_pretrained(base, ADAPTER, is_trainable=True)"
        )
    return str(active[0])


def has_adapter(model: PeftModel, name: str) -> bool:
    """Say whether the layers of a model still hold an adapter."""
    return any(isinstance(m, QALoRALinear) and name in m.scaling for m in model.modules())


def check_all_is_saved(model: PeftModel, name: str) -> None:
    """Refuse to train what is neither in the adapter nor in modules_to_save.

    Args:
        model: with adapters.
        name: of the adapter that is saved.

    Raises:
        ConfigError: a parameter outside of it is trained, and would be lost.
    """
    parameters = [plain_name(n) for n, p in model.named_parameters() if p.requires_grad]
    outside = [n for n in parameters if PREFIX not in n and ".modules_to_save." not in n]
    if not outside:
        return
    kept = get_peft_model_state_dict(model, adapter_name=name)  # embeddings, once resized
    lost = [parameter for parameter in outside if parameter not in kept]
    if lost:
        raise ConfigError(
            f"MergeCallback: {lost[0]} is trained ({len(lost)} such parameters), but neither the "
            "adapter nor modules_to_save holds it, and a merge would lose it. Name its module in "
            "QALoRAConfig(modules_to_save=[...]), or set requires_grad to False"
        )


def check_head(model: PeftModel) -> None:
    """Refuse to train on a head that neither the base's files nor the adapter's will hold.

    Args:
        model: with adapters, before training.

    Raises:
        ConfigError: the head is random in this model, and would be lost.
    """
    base, directory = model.get_base_model(), quantized_base_on_disk(model)
    for name in _HEADS:
        head = getattr(base, name, None)
        if head is None or isinstance(head, AuxiliaryTrainingWrapper) or directory is None:
            continue
        if not any(key.startswith(f"{name}.") for key in open_quantized(directory).reader.tensors):
            raise ConfigError(
                f"{type(base).__name__}: {name} is not in the files of {directory} and so is "
                "random here, and the adapter does not save it: a merge would lose it. Give "
                f"QALoRAConfig the task_type of this class (SEQ_CLS for a reward model), or "
                f"modules_to_save=[{name!r}]"
            )


def check_base(model: PeftModel, set_by_trainer: Collection[str] = ()) -> None:
    """Refuse to train on a base that is not what its files hold: it, or its config, was changed.

    Embeddings, norms, biases and heads are compared, where the files call them as the model does,
    and the config: a merge takes all that from the files. Resized embeddings go into the adapter.

    Args:
        model: with adapters.
        set_by_trainer: more keys of the config that may differ.

    Raises:
        ConfigError: a tensor has other numbers than the files, or the config another value.
    """
    directory, base = quantized_base_on_disk(model), model.get_base_model()
    if directory is None:
        return
    advice = (
        "Save the changed model (save_pretrained(DIR), before it gets an adapter) and train on that"
    )
    loaded = type(base.config).from_pretrained(directory).to_dict()
    key = _different_key(loaded, base.config.to_dict(), _SET_BY_TRAINERS.union(set_by_trainer))
    if key is not None:
        raise ConfigError(
            f"{key} of the model's config is not as in {directory / CONFIG_FILE}, "
            f"and a merge would take it from there. {advice}, or leave it as it is"
        )
    stored = open_quantized(directory)
    names = set(stored.dense_names)
    for name, parameter in base.named_parameters():
        name = plain_name(name).replace(".base_layer.", ".")
        if name not in names or is_sharded(parameter) or parameter.is_meta:
            continue
        wanted, found = stored.reader.get(name), parameter.detach().cpu()
        if wanted.shape != found.shape or torch.equal(wanted.to(found.dtype), found):
            continue
        # 16-bit types may have been converted into one another
        if not torch.allclose(wanted.float(), found.float(), rtol=2**-7, atol=1e-6):
            raise ConfigError(
                f"{name} was changed after the base was loaded, and a merge would "
                f"take it from {directory} as it is there. {advice}, or name its module in "
                "modules_to_save of QALoRAConfig (of Axolotl: lora_modules_to_save)"
            )


def _different_key(wanted: dict[str, Any], found: dict[str, Any], but: Set[str]) -> str | None:
    """Return the first key of two configs that differs, and is not one of `but`."""
    for key in sorted(wanted.keys() | found.keys()):
        one, other = wanted.get(key), found.get(key)
        if key in but or key.startswith("_") or key.endswith(("dropout", "_pdrop")):
            continue
        if isinstance(one, dict) and isinstance(other, dict):
            inner = _different_key(one, other, but)
            if inner is not None:
                return f"{key}.{inner}"
        elif one != other:
            return key
    return None
