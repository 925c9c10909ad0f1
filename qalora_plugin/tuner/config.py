"""`QALoRAConfig`: LoRA's settings under LoRA's names, what is adapted, and on which base."""

import dataclasses
import functools
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.peft_types import PeftType

from qalora_kernels import SUPPORTED_BITS

from ..errors import AdapterError, ConfigError
from ..files.manifest import check_manifest, write_manifest
from ..files.names import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from ..files.safetensors import read_header
from ..files.schemas import AdapterConfig, read_as
from .names import ADAPT_PARTS
from .scaling import SCALING_FIELDS, check_scaling, is_int, is_number, rank_and_scaling

_log = logging.getLogger(__name__)

PEFT_TYPE = "QALORA"
CONVENTION = "sum"
ALL_LINEAR = "all-linear"

_ADVICE = {
    "use_dora": "DoRA's magnitudes cannot be folded into scales and offsets",
    "use_qalora": "that is PEFT's own QA-LoRA; QALoRAConfig already is QA-LoRA",
    "qalora_group_size": "the group size is the base's own",
    "loftq_config": "the base is quantized already; pick a better quantizer instead of LoftQ",
    "fan_in_fan_out": "quantized layers know their own layout",
    "trainable_token_indices": 'use modules_to_save=["embed_tokens", "lm_head"]',
    "ensure_weight_tying": "modules_to_save of a tied module is saved untied",
    "target_parameters": "only quantized linear layers can be adapted; use target_modules",
    "lora_bias": "the format has no place for a bias of B",
}


def _is_list(value: Any, kind: type) -> bool:
    """Say whether a value is None, or a list, tuple, set or the like of values of one type."""
    listed = isinstance(value, Collection) and not isinstance(value, str | bytes)
    return value is None or (listed and all(type(item) is kind for item in value))


def _unsupported(name: str, value: Any) -> ConfigError:
    advice = _ADVICE.get(name, "there is no counterpart for an INT-n base")
    return ConfigError(
        f"QALoRAConfig: {name}={value!r} is LoRA's and not supported by QA-LoRA: {advice}. "
        f"Leave {name} out"
    )


def _refuse_lora_only_fields(cls: type) -> type:
    """Let the constructor take every field of LoRA's: switched off it is dropped, else refused."""
    generated = cls.__init__  # type: ignore[misc]
    ours = {item.name for item in dataclasses.fields(cls)}
    switched_off = {name: off for name, off in vars(LoraConfig()).items() if name not in ours}

    @functools.wraps(generated)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for name, off in switched_off.items():
            value = kwargs.pop(name, off)
            if value and value != off:
                raise _unsupported(name, value)
        generated(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_refuse_lora_only_fields
@dataclass
class QALoRAConfig(PeftConfig):
    """Settings of a QA-LoRA adapter (arXiv 2309.14717). LoRA's fields keep LoRA's meaning.

    Args:
        r: rank.
        lora_alpha: the change is scaled by lora_alpha / r, or / sqrt(r) with `use_rslora`.
        lora_dropout: dropout on pool(x), in [0, 1). Above 0 training leaves the folded path for
            a slower one; adapt="zeros" only.
        target_modules: names, last parts of names, a regular expression, or "all-linear". None and
            "all-linear" stand for every quantized linear layer.
        exclude_modules: names or a regular expression of modules to leave alone.
        modules_to_save: unquantized modules to train as a whole and save with the adapter.
        layers_to_transform: only layers with these numbers.
        layers_pattern: name of the ModuleList that the numbers refer to.
        rank_pattern: other ranks for some modules, {name or regular expression: r}.
        alpha_pattern: likewise for lora_alpha.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        bias: "none", the only value: biases stay as they are.
        init_lora_weights: True starts A uniform and B at zero, a no-op; False both at random.
        adapt: what is learned: "zeros" (the paper: offsets), "scales" (a relative change of the
            scales; the zero-points stay) or "both".
        write_back: of a base in a foreign format: keep within what a copy of its file can take
            back (`qalora export --format original`): layers that cannot are not adapted, and an
            `adapt` that none can take back is refused. False: adapt all; other exports hold the
            result. None: True, but for stock GPTQ.
        seed: of the initialisation, which does not depend on the state of any random generator.
        bits: of the base. This and the next five are filled in when the adapter meets its base,
            and are checked when it is loaded.
        group_size: of the base.
        fingerprint: of the base's integers.
        base_merged: what was merged into the base before, its quantization_config's `merged`.
        base_refined: how the base was refined, its quantization_config's `base["refined"]`.
        convention: "sum", how inputs are pooled; the only value.

    Raises:
        ConfigError: a value is out of range, or a field of LoRA's that is not supported is set.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool = True
    adapt: str = "zeros"
    write_back: bool | None = None
    seed: int = 0
    bits: int | None = None
    group_size: int | None = None
    fingerprint: str | None = None
    base_merged: dict[str, Any] | None = None
    base_refined: dict[str, Any] | None = None
    convention: str = CONVENTION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        self._check_types()
        self.rank_pattern = dict(self.rank_pattern or {})
        self.alpha_pattern = dict(self.alpha_pattern or {})
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        for name in ("modules_to_save", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, Collection):  # PEFT extends it, and JSON takes no range
                setattr(self, name, list(value))
        check_scaling(vars(self), "QALoRAConfig", ConfigError)
        self._check_choices()
        self._check_modules()

    def _check_types(self) -> None:
        """Check what PEFT would misread: a string as modules_to_save stands for its letters."""
        layers = self.layers_to_transform
        rules = {
            "modules_to_save": (_is_list(self.modules_to_save, str), "a list of names"),
            "layers_to_transform": (
                is_int(layers) or _is_list(layers, int),
                "a number, or a list of numbers",
            ),
            "use_rslora": (isinstance(self.use_rslora, bool | None), "True or False"),
            "write_back": (isinstance(self.write_back, bool | None), "True, False or None"),
        }
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            valid = isinstance(value, str) or _is_list(value, str)
            rules[name] = (valid, "a name, or a list of names")
        for name in ("rank_pattern", "alpha_pattern"):
            valid = isinstance(getattr(self, name), dict | None)
            rules[name] = (valid, "a dictionary {name: number}")
        self._refuse(rules)

    def _refuse(self, rules: dict[str, tuple[bool, str]]) -> None:
        """Refuse the first field whose rule, {name: (valid, expected)}, does not hold."""
        for name, (valid, expected) in rules.items():
            if not valid:
                found = getattr(self, name)
                raise ConfigError(f"QALoRAConfig: {name} must be {expected}, found {found!r}")

    def _check_choices(self) -> None:
        dropout, seed = self.lora_dropout, self.seed
        rules = {
            "adapt": (self.adapt in list(ADAPT_PARTS), f"one of {sorted(ADAPT_PARTS)}"),
            "convention": (self.convention == CONVENTION, repr(CONVENTION)),
            "init_lora_weights": (
                isinstance(self.init_lora_weights, bool),
                "True or False (the initialisations that read the base's weights do not apply to "
                "integers)",
            ),
            "bias": (
                self.bias == "none",
                '"none" (biases of quantized layers stay as they are; to train one, leave its '
                "layer unquantized with modules_to_not_convert and name the layer in "
                "modules_to_save)",
            ),
            "lora_dropout": (is_number(dropout) and 0 <= dropout < 1, "in [0, 1)"),
            "seed": (is_int(seed) and seed >= 0, "an integer of 0 or more"),
            "bits": (self.bits in (None, *SUPPORTED_BITS), f"one of {SUPPORTED_BITS}, or left out"),
        }
        self._refuse(rules)
        if dropout > 0 and self.adapt != "zeros":
            raise ConfigError(
                f'QALoRAConfig: lora_dropout={dropout} needs adapt="zeros", found '
                f"adapt={self.adapt!r}: a change of the scales acts on each input by itself, so "
                "there is no pool(x) to drop from. Set lora_dropout=0"
            )

    def _check_modules(self) -> None:
        targets = self.target_modules
        if targets is not None and not targets:
            raise ConfigError(
                "QALoRAConfig: target_modules is empty; leave it out to adapt every quantized layer"
            )
        if isinstance(targets, str) and targets.lower() != ALL_LINEAR:
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"QALoRAConfig: {name} cannot go with a regular expression as "
                        f"target_modules ({targets!r}); write the layers into the expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError("QALoRAConfig: layers_pattern needs layers_to_transform")

    @property
    def trainable_token_indices(self) -> None:
        """None: TRL reads this, and writes it when a chat template brings new tokens."""
        return None

    @trainable_token_indices.setter
    def trainable_token_indices(self, value: Any) -> None:
        raise _unsupported("trainable_token_indices", value)

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Return the rank, and the factor of B A, for the module `name` of the base model."""
        return rank_and_scaling(name, **{field: getattr(self, field) for field in SCALING_FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; sets are sorted, so that equal configs make equal files."""
        values = super().to_dict().items()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with the whole path of a base that is on this disk.

        A manifest of it and the tensors, which PEFT wrote before, comes with it. What else a
        trainer saves there, such as the tokenizer, is not in the manifest.
        """
        base: str | None = getattr(self, "base_model_name_or_path", None)
        if base and Path(base).expanduser().exists():
            self.base_model_name_or_path = str(Path(base).expanduser().absolute())
        super().save_pretrained(save_directory, **kwargs)
        if Path(save_directory, ADAPTER_WEIGHTS_FILE).exists():
            names = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)
            write_manifest(Path(save_directory), names)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PeftConfig:
        """Read adapter_config.json, and check a local adapter's files before PEFT reads them.

        Raises:
            AdapterError: a local adapter has no safetensors, only a pickle, which PEFT would read;
                or a value in its config is of another type.
            CheckpointError: its tensors are truncated or damaged, or differ from its manifest.
        """
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        pickled, safe = directory / WEIGHTS_NAME, directory / SAFETENSORS_WEIGHTS_NAME
        if pickled.exists() and not safe.exists():
            raise AdapterError(
                f"{pickled}: an adapter in a pickle, which can run code when it is read; expected "
                f"{SAFETENSORS_WEIGHTS_NAME}. Save the adapter again with safetensors"
            )
        if (directory / ADAPTER_CONFIG_FILE).exists():
            read_as(directory / ADAPTER_CONFIG_FILE, AdapterConfig, error=AdapterError)
        if safe.exists():
            read_header(safe)
            check_manifest(directory)
        found = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        if getattr(found, "fingerprint", "") is None:
            _log.warning(
                "%s: fingerprint: found none: nothing shows that the adapter was trained on the "
                "base that it is put on, and `qalora merge` will refuse it",
                directory / ADAPTER_CONFIG_FILE,
            )
        return found
