"""One tree of errors: catch `QALoRAError` for all that this package raises about its input.

Every message says which file, tensor or key is wrong, what was expected, what was found, and
what to do. All of them are raised before the first byte of output is written.
"""


class QALoRAError(Exception):
    """Base class of every error that this package raises on purpose."""


class ConfigError(QALoRAError, ValueError):
    """A setting is out of range, contradicts another one, or is not supported."""


class CheckpointError(QALoRAError, ValueError):
    """A checkpoint directory is damaged, incomplete, or contradicts its own config."""


class AdapterError(QALoRAError, ValueError):
    """An adapter is damaged, incomplete, or belongs to another base."""


class QuantizationError(QALoRAError, ValueError):
    """A layer or its calibration data cannot be quantized."""


class OutputError(QALoRAError, OSError):
    """The place to write to is taken, or cannot be written."""


class VerificationError(QALoRAError, AssertionError):
    """A merged or exported model is not what the base and the adapter say it must be."""


class RankError(QALoRAError, RuntimeError):
    """Another process of the same training has died or failed."""
