"""Directories that stock transformers loads with torchao."""

from ...checkpoint.format import Engine, Format, Grids, Runtime

FORMAT = Format(
    name="torchao",
    package=__name__,
    grids=Grids(holder="torchao"),
    runs_in="stock transformers",
    runtime=Runtime(
        "stock transformers", (("transformers",), ("torchao",)), "transformers torchao"
    ),
    engines=(
        Engine(
            "transformers 5.16.1 with torchao 0.17.0",
            "exactly",
            "",
            "integration/export/test_runtimes.py::test_torchao_in_stock_transformers",
        ),
        Engine(
            "vLLM 0.32.0",
            "not",
            "refused: it would truncate the zero-points",
            "integration/vllm/test_stock.py::test_vllm_refuses_torchao_exports",
        ),
    ),
    hub_library="transformers",
    usage="""```python
from transformers import pipeline  # pip install transformers torchao

print(pipeline("text-generation", "{repo_id}")("Once upon a time")[0])
```""",
    quant_methods=("torchao",),
)
