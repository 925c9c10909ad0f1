"""ONNX Runtime directories for onnxruntime-genai."""

from ...checkpoint.format import Engine, Format, Grids, Runtime

MODEL_FILE = "model.onnx"
FORMAT = Format(
    name="onnx",
    package=__name__,
    grids=Grids(
        blocks=(256, 128, 64, 32, 16),
        short_last=True,
        holder="MatMulNBits",
        pieces="blocks of 16, 32, 64, 128 or 256",
    ),
    runs_in="ONNX Runtime",
    runtime=Runtime("ONNX Runtime", (("onnxruntime",),), "onnxruntime-genai"),
    engines=(
        Engine(
            "ONNX Runtime 1.31.1, onnxruntime-genai",
            "exactly",
            "",
            "integration/export/test_runtimes.py::test_onnx",
        ),
    ),
    hub_library="onnxruntime",
    usage="""```python
import onnxruntime_genai as og  # pip install onnxruntime-genai huggingface_hub
from huggingface_hub import snapshot_download

model = og.Model(snapshot_download("{repo_id}"))
```""",
    marker=MODEL_FILE,
    libraries=("onnx", "onnxruntime_genai", "onnx_ir"),
)
