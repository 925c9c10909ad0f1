"""Load a model as its users do, in the class that its config.json names."""

from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_model(directory: Path, class_name: str | None = None, **options: Any) -> nn.Module:
    """Load a model in fp32.

    Args:
        directory: of the model.
        class_name: of transformers; by default the one that config.json names.
        options: for `from_pretrained`.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    name = class_name or (config.architectures or ["AutoModelForCausalLM"])[0]
    model_class: Any = getattr(transformers, name, transformers.AutoModelForCausalLM)
    model = model_class.from_pretrained(directory, dtype=torch.float32, **options).eval()
    for parameter in model.parameters():
        if parameter.is_floating_point():  # products with views into a file round by its alignment
            parameter.data = parameter.data.clone()
    return model
