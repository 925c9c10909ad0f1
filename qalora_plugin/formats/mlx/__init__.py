"""Directories that mlx-lm loads."""

from ...checkpoint.format import ADAPT_MODES, Engine, Format, Grids, Runtime

QUANTIZATION = "quantization"
GROUP_SIZES = (128, 64, 32)
FORMAT = Format(
    name="mlx",
    package=__name__,
    grids=Grids(
        blocks=GROUP_SIZES, holder="MLX", pieces="whole groups of 32, 64 or 128, which MLX has"
    ),
    runs_in="mlx-lm",
    runtime=Runtime("mlx-lm", (("mlx_lm",),), "'mlx[cpu]' mlx-lm"),
    engines=(
        Engine("mlx-lm 0.32.2", "exactly", "", "integration/export/test_runtimes.py::test_mlx"),
        Engine(
            "mlx-lm 0.32.2",
            "exactly",
            "mixtures of experts",
            "integration/export/test_mixtures.py::test_runtime",
        ),
    ),
    hub_library="mlx",
    usage="""```
pip install mlx-lm
mlx_lm.generate --model {repo_id} --ignore-chat-template --prompt "Once upon a time"
```""",
    holds_experts=True,
    config_key=QUANTIZATION,
    unnamed_keys=("bits", "group_size"),
    is_base=True,
    reads_exports=False,  # their scales are fp32
    takes_back=ADAPT_MODES,
)
