"""QA-LoRA (arXiv 2309.14717): adapters that merge exactly into an INT-n base.

Importing this package registers the transformers quantizer "qalora", the PEFT method QALORA and
the foreign formats that can be a base; it reaches for no network and no GPU.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .checkpoint.config import QALoRAQuantConfig
from .errors import QALoRAError
from .formats import register as _register_formats
from .hf.quantizer import register as _register_quantizer
from .tuner.register import register as _register_tuner

if TYPE_CHECKING:
    from .formats.export import export_model
    from .merge.merge import merge_adapter
    from .quantize.options import QuantizeOptions
    from .quantize.pipeline import quantize_model
    from .training.callback import MergeCallback
    from .training.figures import FiguresCallback
    from .tuner import QALoRAConfig, QALoRAModel
    from .tuner.parameter_groups import parameter_groups
    from .verify.merge import verify_merge

_register_formats()
_register_quantizer()
_register_tuner()

# found on first use: the command line and a plain from_pretrained should not wait for all of it
_LAZY = {
    "FiguresCallback": ".training.figures",
    "MergeCallback": ".training.callback",
    "QALoRAConfig": ".tuner",
    "QALoRAModel": ".tuner",
    "QuantizeOptions": ".quantize.options",
    "export_model": ".formats.export",
    "merge_adapter": ".merge.merge",
    "parameter_groups": ".tuner.parameter_groups",
    "quantize_model": ".quantize.pipeline",
    "verify_merge": ".verify.merge",
}

__all__ = [
    "FiguresCallback",
    "MergeCallback",
    "QALoRAConfig",
    "QALoRAError",
    "QALoRAModel",
    "QALoRAQuantConfig",
    "QuantizeOptions",
    "__version__",
    "export_model",
    "merge_adapter",
    "parameter_groups",
    "quantize_model",
    "verify_merge",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
