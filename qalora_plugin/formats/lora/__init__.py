"""Plain PEFT LoRA adapters on the quantized base."""

from ...checkpoint.format import Engine, Format, Grids, Option, Runtime
from ...files.names import ADAPTER_CONFIG_FILE

FORMAT = Format(
    name="lora",
    package=__name__,
    grids=Grids(act_order=True),
    runs_in="PEFT on the quantized base",
    runtime=Runtime("stock PEFT", (("peft",), ("torchao",)), "peft torchao", on="torchao"),
    engines=(
        Engine(
            "PEFT 0.20.0 on the base as torchao export",
            "exactly",
            "",
            "integration/export/test_runtimes.py::test_lora_in_stock_peft",
        ),
    ),
    hub_library="peft",
    usage="""```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "{repo_id}")  # base: the quantized base named above
```""",
    marker=ADAPTER_CONFIG_FILE,
    of_adapter=True,
    adapts=("zeros",),
    advice="a change of scales is no low-rank change of the weights. Set adapt: zeros, or remove "
    "lora",
    options=(
        Option("base", "its quantized base (default: what its config names)", metavar="DIR"),
        Option(
            "convention",
            "how the adapter pools, where its config does not say (see `qalora merge`)",
            choices=("auto", "sum", "mean", "peft"),
        ),
    ),
)
