"""compressed-tensors checkpoints, in llm-compressor's format pack-quantized."""

from ...checkpoint.format import Format, Grids, Runtime
from .. import REQUANTIZE

FORMAT = Format(
    name="compressed-tensors",
    package=__name__,
    grids=Grids(integer_zeros=True, holder="compressed-tensors"),
    runs_in="stock transformers with compressed-tensors",
    runtime=Runtime(
        "stock transformers with compressed-tensors",
        (("transformers",), ("compressed_tensors",)),
        "transformers compressed-tensors",
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
