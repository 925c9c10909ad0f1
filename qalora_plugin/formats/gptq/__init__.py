"""Stock GPTQ checkpoints of AutoGPTQ and GPTQModel: read as bases, written as exports."""

from ...checkpoint.format import Engine, Format, Grids, Option, Runtime
from ...files.names import QUANTIZE_CONFIG_FILE
from .. import REQUANTIZE

FORMAT = Format(
    name="gptq",
    package=__name__,
    grids=Grids(act_order=True, integer_zeros=True, holder="stock GPTQ"),
    runs_in="AutoGPTQ, GPTQModel",
    runtime=Runtime("GPTQModel or AutoGPTQ", (("gptqmodel", "auto_gptq"),), "gptqmodel"),
    engines=(
        Engine(
            "AutoGPTQ 0.7.1, GPTQModel 5.8.0",
            "exactly",
            "GPTQModel with its torch kernel",
            "integration/export/test_gptq.py::test_engines_compute_what_we_compute",
        ),
        Engine(
            "vLLM 0.32.0, CPU",
            "exactly",
            "4 bits, sym: true, no act-order",
            "integration/vllm/test_stock.py::test_vllm_runs_it_exactly",
        ),
        Engine(
            "vLLM 0.32.0, CPU",
            "not",
            "asymmetric, 3 bits or act-order: refused",
            "integration/vllm/test_stock.py::test_vllm_refuses_what_it_has_no_kernel_for",
        ),
    ),
    hub_library="transformers",
    usage="""```python
from gptqmodel import GPTQModel  # pip install gptqmodel

model = GPTQModel.load("{repo_id}")
```""",
    marker=QUANTIZE_CONFIG_FILE,
    quant_methods=("gptq",),
    is_base=True,
    owners=("gptqmodel", "optimum"),
    takes_back=("scales",),
    keeps_within=False,
    back_note="its zero-points are integers",
    adapts=("scales",),
    advice="stock GPTQ stores integer zero-points, and training the offsets makes them "
    "real-valued. Set adapt: scales and zero_points: integer; or remove gptq, and quantize the "
    "merged model again with `qalora export --format gptq --requantize`",
    options=(
        Option(
            "checkpoint_format",
            "gptq (default) for AutoGPTQ and GPTQModel, gptq_v2 for GPTQModel alone",
            choices=("gptq", "gptq_v2"),
        ),
        *REQUANTIZE,
    ),
)
