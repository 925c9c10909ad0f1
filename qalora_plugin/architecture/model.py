"""A checkpoint's model as transformers builds it, without weights, for what its class knows."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from accelerate import init_empty_weights
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..distributed.sharding import in_one_process
from ..errors import CheckpointError
from ..files.names import CONFIG_FILE
from ..files.schemas import ConfigFile, read_as
from .names import LayerNames
from .unfuse import unfuse_experts

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_DEEPEST = 4096  # layers of a model of which nothing else is known
_LARGEST = 1 << 28  # of any size in a config; the longest contexts have 10^7 positions


@dataclass(frozen=True)
class Architecture:
    """A model class, its tensors on the meta device, and where a checkpoint stores them.

    Args:
        model: without weights.
        stored: the checkpoint's name of each of the model's parameters and buffers that it has, by
            the model's name. A quantized layer's is that of its `weight`.
        is_converted: whether transformers also fuses or splits tensors, so that some that the
            checkpoint has are not in `stored`.
    """

    model: PreTrainedModel
    stored: dict[str, str]
    is_converted: bool

    @property
    def class_name(self) -> str:
        """Name of the model class."""
        return type(self.model).__name__

    @property
    def tied(self) -> dict[str, str]:
        """Tied parameters by the checkpoint's names, {usually left out of files: written}."""
        tied = self.model.all_tied_weights_keys
        return {self.stored_name(copy): self.stored_name(name) for copy, name in tied.items()}

    @property
    def embeddings(self) -> set[str]:
        """Names of the input and output embeddings' parameters, by the checkpoint's names."""
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        return {
            self.stored_name(f"{name}.{leaf}")
            for name, module in self.model.named_modules(remove_duplicate=False)
            if any(module is embedding for embedding in modules)
            for leaf, _ in module.named_parameters(recurse=False)
        }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by the checkpoint's name; what is tied has two names."""
        parameters = self.model.named_parameters(remove_duplicate=False)
        return {self.stored_name(name): tuple(value.shape) for name, value in parameters}

    def stored_name(self, name: str) -> str:
        """Return the checkpoint's name of a tensor; the model's own where it has none."""
        return self.stored.get(name, name)


def read_hf_config(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Return transformers' config of a directory.

    Args:
        directory: of a model.
        trust_remote_code: run the model's own Python code; without it that is never run.

    Raises:
        CheckpointError: transformers has no such model, or config.json contradicts its class.
    """
    if (directory / CONFIG_FILE).is_file():
        check_sizes(read_as(directory / CONFIG_FILE, ConfigFile), directory / CONFIG_FILE)
    try:
        return transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # of transformers' code, which trusts a config
        raise CheckpointError(
            f"{directory / CONFIG_FILE}: transformers cannot read it without running code that the "
            f"model brings, or it is damaged ({str(error).strip().partition(chr(10))[0]}). Use a "
            "model whose class transformers has."
        ) from error


def auto_class_names(auto_class: Any, model_type: Any) -> list[str]:
    """Return the model classes that one of transformers' Auto classes may choose for a type."""
    found = auto_class._model_mapping._model_mapping.get(model_type)
    return [found] if isinstance(found, str) else list(found or ())


def empty_model(
    config: Any, class_name: str | None = None, *, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Build a model without weights: parameters on the meta device, buffers with their numbers.

    Args:
        config: of transformers.
        class_name: of transformers; None, or a name that it does not have, for the causal LM of
            the config's type.
        trust_remote_code: run the model's own Python code.
        options: for the model class, such as `dtype`.
    """
    model_class: Any = getattr(transformers, str(class_name), None)
    with in_one_process(), init_empty_weights(include_buffers=False), no_init_weights():
        if hasattr(model_class, "_from_config"):
            return model_class._from_config(config, **options)
        return transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code, **options
        )


def build_empty(
    config: dict[str, Any], names: Sequence[str], class_name: str | None = None
) -> PreTrainedModel:
    """Build the model of a config.json without weights, which may have been written by anybody.

    Args:
        config: config.json, without `quantization_config`.
        names: of the checkpoint's tensors, of which every layer has some.
        class_name: see `empty_model`.

    Raises:
        CheckpointError: it has more layers than there are tensors, or transformers cannot build it.
    """
    check_sizes(config, CONFIG_FILE, len(names))
    try:
        return empty_model(CONFIG_MAPPING[config["model_type"]].from_dict(config), class_name)
    except Exception as error:  # of transformers' code, which trusts a config
        raise CheckpointError(
            f"{CONFIG_FILE}: transformers cannot build the model that it describes "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}). Restore "
            "the original file."
        ) from error


def check_sizes(config: dict[str, Any], where: str | Path, layers: int = _DEEPEST) -> None:
    """Refuse sizes that would take hours or all memory, before anything is built.

    Args:
        config: config.json.
        where: the file, for the message.
        layers: the most that there can be, such as the number of tensors.

    Raises:
        CheckpointError: names the key.
    """
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            check_sizes(value, where, layers)
        most = layers if key in _DEPTHS else _LARGEST
        if isinstance(value, int) and abs(value) > most:
            raise CheckpointError(
                f"{where}: {key}: expected at most {most}, found {value}. Restore the original "
                "file."
            )


def read_architecture(
    config: dict[str, Any], names: Iterable[str], class_name: str | None = None
) -> Architecture | None:
    """Build a checkpoint's model on the meta device, and find where its tensors are stored.

    Args:
        config: config.json.
        names: of the checkpoint's tensors, which are translated; a quantized layer's is that of its
            `weight`.
        class_name: of transformers; by default what config.json names.

    Returns:
        None where transformers has no such class (a model with code of its own).
    """
    raw, names = copy.deepcopy(config), list(names)
    raw.pop("quantization_config", None)
    model_type = raw.get("model_type")
    classes = [class_name] if class_name else raw.get("architectures")
    classes = classes or auto_class_names(transformers.AutoModelForCausalLM, model_type)
    model_class = getattr(transformers, str(classes[0]), None) if classes else None
    if not hasattr(model_class, "_from_config") or model_type not in CONFIG_MAPPING:
        return None
    model = build_empty(raw, names, classes[0])
    unfuse_experts(model, names)
    translate = LayerNames(model)
    return Architecture(model, translate.stored(names), translate.are_converted)
