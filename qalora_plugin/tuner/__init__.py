"""The PEFT method QALORA; `register` makes it known to PEFT."""

from typing import TYPE_CHECKING

from qalora_kernels.lazy import lazy_names

if TYPE_CHECKING:
    from .config import QALoRAConfig
    from .layer import QALoRALinear
    from .model import QALoRAModel

__all__ = ["QALoRAConfig", "QALoRALinear", "QALoRAModel"]

__getattr__ = lazy_names(
    __name__, {"QALoRAConfig": ".config", "QALoRALinear": ".layer", "QALoRAModel": ".model"}
)
