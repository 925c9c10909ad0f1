"""Load a quantized model as its users do, in the class that its config.json names."""

from typing import Any

import torch
from torch import nn

from ..architecture.model import read_hf_config
from ..checkpoint.checkpoint import QuantizedCheckpoint
from .config import QALoRAQuantConfig


def load_model(
    source: QuantizedCheckpoint, class_name: str | None = None, **options: Any
) -> nn.Module:
    """Load a quantized model in fp32, whether it is stored in our format or in a foreign one.

    Args:
        source: the model.
        class_name: of transformers; by default the one that config.json names.
        options: for `from_pretrained`.
    """
    import transformers

    directory = source.directory
    if source.is_foreign:
        own = QALoRAQuantConfig(source.config.bits, source.config.group_size)
        options["quantization_config"] = own
    config = read_hf_config(directory)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        options.setdefault("attn_implementation", "eager")  # the others leave it out unsaid
    name = class_name or (config.architectures or ["AutoModelForCausalLM"])[0]
    model_class: Any = getattr(transformers, name, None)
    if model_class is None:
        model_class = transformers.AutoModelForCausalLM
        options["trust_remote_code"] = False
    model = model_class.from_pretrained(directory, dtype=torch.float32, **options).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # products with views into a file round by its alignment
            parameter.data = parameter.data.clone()
    return model
