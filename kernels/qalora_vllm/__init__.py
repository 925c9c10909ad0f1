"""vLLM runs checkpoints of `quant_method: "qalora"`: a plugin in the group `vllm.general_plugins`.

It needs torch, vLLM and `qalora_kernels`, so a serving image takes it as it is
(`pip install --no-deps .` in a clone). vLLM finds it by its entry point and calls `register` in
every process. `reading` makes a layer's tensors one `PackedWeight`, `shards` knows which part of it
a rank computes, `kernels` how; `config` and `method` are what vLLM asks for.
"""


def register() -> None:
    """Tell vLLM of our format; nothing of vLLM is imported before."""
    from . import config

    config.register()
