"""GGUF files for llama.cpp and all that is built on it."""

from ...checkpoint.format import ADAPT_MODES, Engine, Format, Grids, Option, Runtime

FORMAT = Format(
    name="gguf",
    package=__name__,
    grids=Grids(
        bits=(2, 3, 4), blocks=(32,), holder="GGUF", pieces="whole blocks of 32", dense_as="F16"
    ),
    runs_in="llama.cpp",
    runtime=Runtime("llama.cpp", (("xllamacpp",),), "xllamacpp", rounds_activations=True),
    engines=(
        Engine(
            "llama.cpp",
            "approximately",
            "it rounds activations to 8 bits",
            "integration/export/test_runtimes.py::test_llama_cpp",
        ),
        Engine(
            "llama.cpp",
            "approximately",
            "mixtures of experts; routers are not rounded, but what they read is",
            "integration/export/test_mixtures.py::test_runtime",
        ),
    ),
    hub_library="gguf",
    usage="""```
hf download {repo_id} {file} --local-dir .
llama-cli -m {file} -p "Once upon a time"
```""",
    holds_experts=True,
    suffix=".gguf",
    options=(
        Option("exact", "layers in fp32, 6.4 times the size: Q4_1 may round minima to f16", bool),
    ),
    is_base=True,
    takes_back=ADAPT_MODES,
    back_note="Q8_0 has no minimum, K-quants round theirs to 6 bits",
    libraries=("gguf",),
    headers="headers",
)
