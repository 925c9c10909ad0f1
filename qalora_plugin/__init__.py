"""QA-LoRA (arXiv 2309.14717): adapters that merge exactly into an INT-n base.

Importing this package registers the transformers quantizer "qalora" and the PEFT method QALORA (see
`register`); it reaches for no network and no GPU.
"""

from typing import TYPE_CHECKING

import qalora_command
from qalora_kernels.lazy import lazy_names

from ._version import __version__
from .errors import QALoRAError
from .formats import register as _register_formats

if TYPE_CHECKING:
    from .formats.export import export_model
    from .hf.config import QALoRAQuantConfig
    from .merge.merge import merge_adapter
    from .quantize.options import QuantizeOptions
    from .quantize.pipeline import quantize_model
    from .training.callback import MergeCallback
    from .training.figures import FiguresCallback
    from .training.rollouts import send_changes, sync_with_vllm
    from .tuner.config import QALoRAConfig
    from .tuner.model import QALoRAModel
    from .tuner.parameter_groups import parameter_groups
    from .verify.merge import verify_merge

# found on first use: the command line and a plain from_pretrained should not wait for all of it
_LAZY = {
    "FiguresCallback": ".training.figures",
    "MergeCallback": ".training.callback",
    "QALoRAConfig": ".tuner.config",
    "QALoRAModel": ".tuner.model",
    "QALoRAQuantConfig": ".hf.config",
    "QuantizeOptions": ".quantize.options",
    "export_model": ".formats.export",
    "merge_adapter": ".merge.merge",
    "parameter_groups": ".tuner.parameter_groups",
    "quantize_model": ".quantize.pipeline",
    "send_changes": ".training.rollouts",
    "sync_with_vllm": ".training.rollouts",
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
    "register",
    "send_changes",
    "sync_with_vllm",
    "verify_merge",
]


def register() -> None:
    """Register the quantizer with transformers and the method with PEFT; importing us does it.

    Only the `qalora` command, whose `--help` and `inspect` need neither, leaves it to be called. A
    second call does nothing.

    Raises:
        ConfigError: a library is too old; see `LIBRARIES` in `_version`.
    """
    from .hf.versions import check_versions

    check_versions()  # before what would fail on an old one
    from .hf.quantizer import register as register_quantizer
    from .tuner.register import register as register_tuner

    register_quantizer()
    register_tuner()


__getattr__ = lazy_names(__name__, _LAZY)

_register_formats()
if not qalora_command.running:
    register()
