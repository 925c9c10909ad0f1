"""Hold a checkpoint's tensors against the model that its config.json describes."""

from ..errors import CheckpointError
from ..files.names import CONFIG_FILE
from .checkpoint import QuantizedCheckpoint


def check_fit(checkpoint: QuantizedCheckpoint) -> None:
    """Check that every tensor has a place of its shape in the model, and every parameter a tensor.

    A layer's guard holds its inputs; here they are held against the architecture. A model with code
    of its own is not checked: it would have to be run.

    Raises:
        CheckpointError: names the tensor or parameter.
    """
    from ..architecture.model import read_architecture  # slow to import
    from ..architecture.places import places_problem

    names = checkpoint.weight_names
    architecture = read_architecture(checkpoint.reader.config, names)
    if architecture is None:
        return
    problem = places_problem(architecture.model, names, checkpoint.layers.keys())
    if problem is not None:
        raise CheckpointError(f"{checkpoint.directory}: {problem}.")
    shapes = architecture.shapes
    for name in names:
        spec = checkpoint.layers.get(name.removesuffix(".weight"))
        is_layer = spec is not None and name.endswith(".weight")
        found = (
            (spec.out_features, spec.in_features)
            if spec is not None and is_layer
            else checkpoint.reader.info(name).shape
        )
        expected = shapes.get(name, found)
        if found != expected:
            raise CheckpointError(
                f"{checkpoint.directory}: {name}: expected shape {list(expected)} as {CONFIG_FILE} "
                f"says, found {list(found)}. The file is damaged, or {CONFIG_FILE} belongs to "
                "another model: copy both from one source."
            )
