"""ONNX Runtime directories for onnxruntime-genai."""

from ...checkpoint.format import Format

FORMAT = Format(name="onnx", package=__name__)
