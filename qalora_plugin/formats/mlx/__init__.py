"""Directories that mlx-lm loads."""

from ...checkpoint.format import Format, Grids, Runtime

FORMAT = Format(
    name="mlx",
    package=__name__,
    grids=Grids(
        blocks=(128, 64, 32), holder="MLX", pieces="whole groups of 32, 64 or 128, which MLX has"
    ),
    runs_in="mlx-lm",
    runtime=Runtime("mlx-lm", (("mlx_lm",),), "'mlx[cpu]' mlx-lm"),
    hub_library="mlx",
    usage="""```
pip install mlx-lm
mlx_lm.generate --model {repo_id} --ignore-chat-template --prompt "Once upon a time"
```""",
    config_key="quantization",
)
