"""Find the repeated transformer blocks of a model."""

from torch import nn

from ..errors import ConfigError


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return name and list of a model's repeated blocks.

    That is the `nn.ModuleList` with the most weights, but for vision or audio towers.

    Raises:
        ConfigError: the model has no such list.
    """
    reads = {
        name: module.main_input_name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "main_input_name", None), str)
    }
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        nested = any(name.startswith(outer + ".") for outer in sizes)
        owners = [owner for owner in reads if not owner or name.startswith(owner + ".")]
        if not nested and (not owners or reads[max(owners, key=len)] == "input_ids"):
            sizes[name] = sum(parameter.numel() for parameter in module.parameters())
    if not any(sizes.values()):
        raise ConfigError(
            f"{type(model).__name__}: expected an nn.ModuleList of transformer blocks, found none; "
            "this architecture cannot be quantized block by block"
        )
    name = max(sizes, key=lambda key: sizes[key])
    blocks = model.get_submodule(name)
    assert isinstance(blocks, nn.ModuleList)
    return name, blocks
