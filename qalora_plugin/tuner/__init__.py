"""The PEFT method QALORA. Importing this package registers it."""

from .config import QALoRAConfig
from .layer import QALoRALinear
from .model import QALoRAModel
from .register import register

__all__ = ["QALoRAConfig", "QALoRALinear", "QALoRAModel", "register"]

register()
