"""Axolotl: `adapter: qalora` in a recipe that lists `qalora_plugin.axolotl.QALoRAPlugin`."""

from .args import QALoRAArgs, QALoRABlock
from .plugin import QALoRAPlugin

__all__ = ["QALoRAArgs", "QALoRABlock", "QALoRAPlugin"]
