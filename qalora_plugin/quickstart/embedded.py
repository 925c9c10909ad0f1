"""Find the small model that is embedded in this package."""

from pathlib import Path

from ..errors import QALoRAError


def base_model_path() -> Path:
    """Return the directory of the embedded base model, as `from_pretrained` takes it.

    Raises:
        QALoRAError: the directory is not complete (a broken installation).
    """
    path = Path(__file__).parent / "base_model"
    names = ("config.json", "model.safetensors", "tokenizer.json")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise QALoRAError(
            f"{path}: the embedded base model lacks {', '.join(missing)}; expected them to be "
            "installed with the package. Reinstall it, or pass a model of your own with --model."
        )
    return path
