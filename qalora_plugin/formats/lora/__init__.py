"""Plain PEFT LoRA adapters on the quantized base."""

from ...checkpoint.format import Format

FORMAT = Format(name="lora", package=__name__)
