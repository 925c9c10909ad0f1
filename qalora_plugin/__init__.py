"""QA-LoRA (arXiv 2309.14717): adapters that merge exactly into an INT-n base.

Importing this package registers the transformers quantizer "qalora" and the PEFT method QALORA;
it reaches for no network and no GPU.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .checkpoint.quantizer import register as _register_quantizer
from .errors import QALoRAError
from .quant.config import QALoRAQuantConfig
from .tuner.register import register as _register_tuner

if TYPE_CHECKING:
    from .export import export_model
    from .merge import merge_adapter
    from .optimizer import parameter_groups
    from .quant.pipeline import quantize_model
    from .trl import MergeCallback
    from .tuner import QALoRAConfig, QALoRAModel
    from .verify import verify_merge

__version__ = "0.1.0"

_register_quantizer()
_register_tuner()

# found on first use: the command line and a plain from_pretrained should not wait for all of it
_LAZY = {
    "MergeCallback": ".trl",
    "QALoRAConfig": ".tuner",
    "QALoRAModel": ".tuner",
    "export_model": ".export",
    "merge_adapter": ".merge",
    "parameter_groups": ".optimizer",
    "quantize_model": ".quant.pipeline",
    "verify_merge": ".verify",
}

__all__ = [
    "MergeCallback",
    "QALoRAConfig",
    "QALoRAError",
    "QALoRAModel",
    "QALoRAQuantConfig",
    "export_model",
    "merge_adapter",
    "parameter_groups",
    "quantize_model",
    "verify_merge",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
