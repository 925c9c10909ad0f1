"""The model that was trained: its class, and what the base calls its tensors.

transformers gives other names to the tensors of some checkpoints: where the class lacks the head
that they were saved with, or has one more, and in vision-language models. An adapter has the names
of the model, a merged checkpoint those of its base.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import transformers

from ..architecture.model import Architecture, auto_class_names, read_architecture
from ..checkpoint.checkpoint import QuantizedCheckpoint
from .adapter import Adapter

# by PEFT's task types
_AUTO_CLASSES: dict[Any, Any] = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


@dataclass(frozen=True)
class TrainedModel:
    """Translates names of the trained model into those of its base, and back.

    A name is that of a tensor, or of a layer, whose name goes with its `weight`.

    Args:
        architecture: the model without weights; None where its names are the base's and nothing
            else has to be known of it, or where transformers has no such class.
    """

    architecture: Architecture | None

    def in_base(self, name: str) -> str:
        """Return the base's name; the model's own where the base has none."""
        return self._names[0].get(name, name)

    def in_model(self, name: str) -> str:
        """Return the trained model's name; the base's own where the model has none."""
        return self._names[1].get(name, name)

    @cached_property
    def _names(self) -> tuple[dict[str, str], dict[str, str]]:
        stored = {} if self.architecture is None else self.architecture.stored
        names = dict(stored)
        for model, base in stored.items():
            if model.endswith(".weight") and base.endswith(".weight"):
                names[model.removesuffix(".weight")] = base.removesuffix(".weight")
        return names, {base: model for model, base in names.items()}


def find_trained_model(adapter: Adapter, base: QuantizedCheckpoint) -> TrainedModel:
    """Find the class in which the adapter's layers exist; the one place that builds it.

    Nothing is built where the adapter brings low-rank changes alone and the names are the base's.
    """
    is_plain = not adapter.saved and not adapter.config.get("modules_to_save")
    if is_plain and all(name in base.layers for name in adapter.layers):
        return TrainedModel(None)
    for class_name in _class_names(adapter, base):
        found = read_architecture(base.reader.config, base.weight_names, class_name)
        if found is not None and all(f"{name}.weight" in found.stored for name in adapter.layers):
            return TrainedModel(found)
    return TrainedModel(None)


def _class_names(adapter: Adapter, base: QuantizedCheckpoint) -> list[str]:
    """Return the model classes to try, the likeliest first."""
    named = (adapter.config.get("auto_mapping") or {}).get("base_model_class")
    saved_from = base.reader.config.get("architectures") or []
    task = adapter.config.get("task_type")
    auto_class, model_type = _AUTO_CLASSES.get(task), base.reader.config.get("model_type")
    fitting = [] if auto_class is None else auto_class_names(auto_class, model_type)
    names = [named, *fitting, *saved_from]
    if task == "CAUSAL_LM" or not set(saved_from).isdisjoint(fitting):
        names = [named, *saved_from, *fitting]
    return [name for name in dict.fromkeys(names) if name]
