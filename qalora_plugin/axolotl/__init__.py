"""Axolotl: `adapter: qalora` in a recipe that lists `qalora_plugin.axolotl.QALoRAPlugin`."""

from typing import TYPE_CHECKING, Any

from .args import QALoRAArgs, QALoRABlock

if TYPE_CHECKING:
    from .plugin import QALoRAPlugin

__all__ = ["QALoRAArgs", "QALoRABlock", "QALoRAPlugin"]


def __getattr__(name: str) -> Any:
    # on first use, because it imports Axolotl, which the rest of this package does without
    if name == "QALoRAPlugin":
        from .plugin import QALoRAPlugin

        return QALoRAPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
