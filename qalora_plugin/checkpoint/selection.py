"""Which linear layers of a model are quantized: one rule for every way of quantizing."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from ..quant.config import QALoRAQuantConfig


def linears_in_blocks(model: nn.Module) -> dict[str, nn.Linear]:
    """The `nn.Linear` layers inside a model's repeated blocks (`nn.ModuleList`s), by name.

    Embeddings, heads, poolers and projections outside the blocks are not among them, nor are
    output embeddings and subclasses of `nn.Linear`, whose forward may do something else.
    """
    blocks = [name + "." for name, module in model.named_modules() if _is_list(module)]
    get_head = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and name.startswith(tuple(blocks))
    }


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def keep_from_initialization(model: nn.Module, name: str) -> None:
    """Stop transformers from initialising the module that holds the layer `name`.

    Some architectures (T5, ModernBERT) do it in the parent, through the layer's `weight`, which a
    quantized layer does not have.
    """
    model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]


def linears_to_quantize(model: nn.Module, config: QALoRAQuantConfig) -> dict[str, nn.Linear]:
    """`linears_in_blocks`, less what the config's `modules_to_not_convert` excludes.

    Raises:
        ConfigError: nothing is left.
    """
    linears = linears_in_blocks(model)
    chosen = {name: module for name, module in linears.items() if config.is_converted(name)}
    if chosen:
        return chosen
    name = type(model).__name__
    if linears:
        raise ConfigError(
            f"{name}: modules_to_not_convert {config.modules_to_not_convert} excludes all "
            f"{len(linears)} linear layers of its blocks. Shorten the list."
        )
    conv = sum(isinstance(module, Conv1D) for module in model.modules())
    found = f"{conv} transformers Conv1D layers (as in GPT-2)" if conv else "none"
    raise ConfigError(
        f"{name}: no layer to quantize: expected torch.nn.Linear layers inside nn.ModuleList "
        f"blocks, found {found}. This architecture is not supported."
    )
