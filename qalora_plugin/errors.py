"""One tree of errors: catch `QALoRAError` for all that this package raises about its input.

Every message says which file, tensor or key is wrong, what was expected, what was found, and
what to do. All of them are raised before the first byte of output is written.
"""


def printable(text: str) -> str:
    """Return a text from a file so that a terminal only shows it, escaped.

    Names of tensors, keys and modules come from files that others wrote; escape sequences among
    them could move the cursor, or hide what was printed. Line ends and tabs stay.
    """
    return "".join(
        character
        if character in "\n\t" or character.isprintable()
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


class QALoRAError(Exception):
    """Base class of every error that this package raises on purpose; its text is `printable`."""

    def __str__(self) -> str:
        return printable(super().__str__())


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
