"""Stock GPTQ checkpoints of AutoGPTQ and GPTQModel: read as bases, written as exports."""

from ...checkpoint.format import Format, Grids, Option, Runtime
from ...files.names import QUANTIZE_CONFIG_FILE

FORMAT = Format(
    name="gptq",
    package=__name__,
    grids=Grids(act_order=True, integer_zeros=True),
    runs_in="AutoGPTQ, GPTQModel",
    runtime=Runtime("GPTQModel or AutoGPTQ", (("gptqmodel", "auto_gptq"),), "gptqmodel"),
    hub_library="transformers",
    usage="""```python
from gptqmodel import GPTQModel  # pip install gptqmodel

model = GPTQModel.load("{repo_id}")
```""",
    marker=QUANTIZE_CONFIG_FILE,
    quant_methods=("gptq",),
    is_base=True,
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
        Option(
            "requantize",
            "of a model with real-valued zero-points: quantize the merged weights again, with "
            "integer ones, and print what that costs in held-out loss and KL divergence",
            bool,
        ),
        Option(
            "calibration",
            "with --requantize: text to quantize on, and other text of it to measure on, as "
            "`qalora quantize` takes it (default: functions of the Python standard library; the "
            "model's own training data is better)",
            metavar="FILE",
        ),
        Option("samples", "with --requantize: calibration windows (default: 128)", int),
        Option("seq_len", "with --requantize: tokens in a window (default: at most 512)", int),
        Option("seed", "with --requantize: of the choice of windows (default: 0)", int),
    ),
)
