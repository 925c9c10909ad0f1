"""compressed-tensors checkpoints (llm-compressor's pack-quantized), which vLLM runs."""

from ...checkpoint.format import Engine, Format, Grids, Runtime
from .. import REQUANTIZE

FORMAT = Format(
    name="compressed-tensors",
    package=__name__,
    grids=Grids(integer_zeros=True, holder="compressed-tensors"),
    runs_in="vLLM, stock transformers with compressed-tensors",
    runtime=Runtime(
        "stock transformers with compressed-tensors",
        (("transformers",), ("compressed_tensors",)),
        "transformers compressed-tensors",
    ),
    engines=(
        Engine(
            "vLLM 0.32.0, CPU",
            "exactly",
            "2, 3 and 4 bits",
            "integration/vllm/test_stock.py::test_vllm_runs_it_exactly",
        ),
        Engine(
            "vLLM 0.32.0, CPU",
            "not",
            "8 bits: refused",
            "integration/vllm/test_stock.py::test_vllm_refuses_what_it_has_no_kernel_for",
        ),
        Engine(
            "transformers 5.16.1 with compressed-tensors 0.20.1",
            "exactly",
            "",
            "integration/bases/test_bases.py"
            "::test_compressed_tensors_exports_run_in_stock_transformers",
        ),
    ),
    hub_library="transformers",
    usage="""```python
import torch
from transformers import pipeline  # pip install transformers compressed-tensors

generate = pipeline("text-generation", "{repo_id}", dtype=torch.float16)
print(generate("Once upon a time")[0])
```""",
    quant_methods=("compressed-tensors",),
    is_base=True,
    takes_back=("scales",),
    back_note="its zero-points are integers",
    owners=("compressed_tensors",),
    adapts=("scales",),
    advice="compressed-tensors stores integer zero-points, and training the offsets makes them "
    "real-valued. Set adapt: scales and zero_points: integer; or remove compressed-tensors, and "
    "quantize the merged model again with `qalora export --format compressed-tensors --requantize`",
    options=REQUANTIZE,
)
