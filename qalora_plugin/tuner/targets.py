"""Which layers of a base an adapter goes on, and which base that is."""

import copy
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from qalora_kernels.stored import QUANT_METHOD, is_excluded

from ..architecture.patterns import match_module
from ..checkpoint.fingerprint import fingerprints, summary
from ..checkpoint.format import Format, format_named, formats, unread_note
from ..checkpoint.identity import BaseIdentity
from ..checkpoint.source import SOURCE_KEY
from ..errors import AdapterError, ConfigError
from ..files.names import ADAPTER_CONFIG_FILE
from ..hf.config import QALoRAQuantConfig
from ..layers.linear import QuantLinear
from .config import ALL_LINEAR, QALoRAConfig
from .selecting import is_selected, pattern_key

_log = logging.getLogger(__name__)
_SHOWN = 8  # names in an error message
# of these PEFT adds names of heads to modules_to_save, whichever the model has
_WITH_HEAD = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS, TaskType.QUESTION_ANS)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base model's own (name, module): an adapted layer stands for its base layer."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if not name or name.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(name + ".")
            module = module.get_base_layer()
        yield name, module


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Return every quantized layer by its name in the base model, adapted or not."""
    return {name: m for name, m in _modules(model) if isinstance(m, QuantLinear)}


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _leaves(names: Any) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def resolve_targets(config: QALoRAConfig, model: nn.Module) -> None:
    """Check `target_modules` against the base, and write "all of them" out as names.

    Raises:
        ConfigError: the base is a PeftModel, or not quantized; no layer matches; a matching module,
            or one in modules_to_save, is of the wrong kind.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            "QALoRAConfig: the model is a PeftModel already, and an adapter around another could "
            "be neither loaded nor merged. Give get_peft_model what model.unload() returns, or add "
            "a second adapter with model.add_adapter(NAME, config)"
        )
    quantized = quantized_layers(model)
    other = getattr(getattr(model, "config", None), "quantization_config", None)
    method = None
    if other is not None and not isinstance(other, QALoRAQuantConfig):
        stated = other if isinstance(other, dict) else other.to_dict()
        method = getattr(stated.get("quant_method"), "value", stated.get("quant_method"))
    if not quantized and method not in (None, "gguf"):  # transformers dequantizes GGUF, marked so
        raise ConfigError(
            f"QALoRAConfig: the base model is quantized with quant_method {method!r}"
            f"{unread_note(method)}, and has no layer of ours. Load the 16-bit model that it was "
            "made from with quantization_config=QALoRAQuantConfig(...), or quantize that one with "
            "`qalora quantize`; what `qalora inspect` calls a base is loaded as it is"
        )
    if not quantized:
        wanted = f"bits={config.bits or 4}, group_size={config.group_size or 32}"
        raise ConfigError(
            "QALoRAConfig: the base model has no quantized layers. Either quantize it while it "
            f"loads, from_pretrained(..., quantization_config=QALoRAQuantConfig({wanted})), or "
            "quantize it once with calibration, which is better: qalora quantize MODEL --out DIR "
            "--calibration FILE. What is quantized already (GGUF) is loaded by its file's name, "
            'from_pretrained("model.gguf"), or imported with `qalora import FILE --out DIR`'
        )
    _refuse_quantized_saves(config, quantized)
    asked = f"QALoRAConfig: target_modules={config.target_modules!r}"
    matched: dict[str, nn.Module]
    if config.target_modules is None or str(config.target_modules).lower() == ALL_LINEAR:
        # by their last parts, so that exclude_modules and layers_to_transform apply
        every = copy.copy(config)
        every.target_modules = set(_leaves(quantized))
        matched = {n: m for n, m in quantized.items() if is_selected(vars(every), n)}
        config.target_modules = set(matched)
    else:
        matched = {n: m for n, m in _modules(model) if is_selected(vars(config), n)}
    if not matched:
        names = ("exclude_modules", "layers_to_transform", "layers_pattern")
        limits = {n: getattr(config, n) for n in names if getattr(config, n) is not None}
        raise ConfigError(
            f"{asked}{f' with {limits}' if limits else ''} matches "
            f"no module of the base. Its quantized layers are {_shorten(_leaves(quantized))} "
            f"(such as {next(iter(quantized))})"
        )
    wrong = {n: m for n, m in matched.items() if not isinstance(m, QuantLinear)}
    if wrong:
        kinds = [f"{name} ({type(module).__name__})" for name, module in wrong.items()]
        raise ConfigError(
            f"{asked} matches modules that are not quantized: "
            f"{_shorten(kinds)}. Leave them out, train them whole through modules_to_save, or "
            "quantize them too (modules_to_not_convert). Quantized are "
            f"{_shorten(_leaves(quantized))}"
        )
    _tell_of_unmatched(config, matched, [name for name, _ in _modules(model)])
    _keep_within(config, list(matched), quantization_config(model))


def _ends(names: Iterable[str]) -> set[str]:
    """Return the names, and the last parts of each."""
    parts = [name.split(".") for name in names]
    return {".".join(name[start:]) for name in parts for start in range(len(name))}


def _tell_of_unmatched(
    config: QALoRAConfig, matched: dict[str, nn.Module], modules: list[str]
) -> None:
    """Warn of names and patterns that select nothing, such as misspelt ones."""
    lost: dict[str, set[str]] = {}
    if not isinstance(config.target_modules, str):
        lost["target_modules"] = set(config.target_modules or ()) - _ends(matched)
    if not isinstance(config.exclude_modules, str):
        lost["exclude_modules"] = set(config.exclude_modules or ()) - _ends(modules)
    if config.task_type not in _WITH_HEAD:
        whole = config.modules_to_save or []
        lost["modules_to_save"] = {e for e in whole if not any(n.endswith(e) for n in modules)}
    layers = config.layers_to_transform
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    found = {part for name in matched for part in name.split(".")}
    lost["layers_to_transform"] = set(map(str, numbers)) - found
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        lost[field] = set(patterns) - {pattern_key(patterns, name) for name in matched}
    for field, entries in lost.items():
        if entries:
            _log.warning(
                "%s: %s: nothing in the base is selected by %s; correct the name, or leave it out",
                *(field, _shorten(sorted(entries)), "it" if len(entries) == 1 else "these"),
            )


def _keep_within(config: QALoRAConfig, matched: list[str], base: QALoRAQuantConfig | None) -> None:
    """Take layers from the targets that the base's own format cannot take back after the merge.

    Raises:
        ConfigError: that is all of them.
    """
    source: dict[str, Any] = {} if base is None else base.base.get(SOURCE_KEY) or {}
    if config.write_back and not source:
        raise ConfigError(
            "QALoRAConfig: write_back=True is for a base that was read from a foreign format, and "
            "this one has no record of a source. Leave write_back out"
        )
    if config.write_back is False or not source:
        return
    format = format_named(source["format"])
    if config.write_back is None and not format.keeps_within:
        return
    frozen = [n for n in matched if is_excluded(n, source["frozen"].get(config.adapt, ()))]
    if len(frozen) == len(matched):
        raise _not_taken_back(config, format, source)
    if frozen:
        config.target_modules = set(matched) - set(frozen)
        _log.warning(
            "%d of %d layers stay frozen, such as %s: format %s cannot take their change back "
            "(write_back=False adapts them, for other exports)",
            *(len(frozen), len(matched), frozen[0], format.name),
        )


def _not_taken_back(config: QALoRAConfig, format: Format, source: dict[str, Any]) -> ConfigError:
    held = [f for f in formats() if not (f.grids.integer_zeros or f.of_adapter or f.of_source)]
    able = [mode for mode in format.takes_back if not source["frozen"].get(mode)]
    way = f"Set adapt={able[0]!r}, which {format.name} takes back, or set" if able else "Set"
    note = f" ({format.back_note})" if format.back_note else ""
    return ConfigError(
        f"QALoRAConfig: adapt={config.adapt!r}: the base is in format {format.name!r}, which "
        f"cannot take that back{note}. {way} write_back=False and export the merged model to "
        f"{', '.join(f.name for f in held)}, or run it in our format"
    )


def _refuse_quantized_saves(config: QALoRAConfig, quantized: dict[str, QuantLinear]) -> None:
    for entry in config.modules_to_save or []:
        held = [n for n in quantized if match_module(entry, n)]
        if held:
            raise ConfigError(
                f"QALoRAConfig: modules_to_save names {entry!r}, which is quantized "
                f"({_shorten(held)}): integers cannot be trained. Adapt it through "
                "target_modules, or leave it unquantized (modules_to_not_convert)"
            )


def quantization_config(model: nn.Module) -> QALoRAQuantConfig | None:
    """Return our quantization config of a model, None where it has none."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
        return QALoRAQuantConfig(**found)
    return found if isinstance(found, QALoRAQuantConfig) else None


def base_identity(model: nn.Module) -> BaseIdentity:
    """Read the identity from the quantization config and the layers.

    The fingerprint is computed from the integers. Of its two forms, with the layers' names in the
    model and in the checkpoint, it is the one that the quantization config names, or the first.
    Where the integers are not there to be read (meta device, ZeRO-3) the config is believed.
    """
    layers = quantized_layers(model)
    stored = quantization_config(model)
    if stored is not None:
        bits, group_size, merged = stored.bits, stored.group_size, stored.merged
        mark, refined = stored.base.get("fingerprint"), stored.base.get("refined")
    else:
        specs = Counter((m.spec.bits, m.spec.group_size) for m in layers.values())
        (bits, group_size), _ = specs.most_common(1)[0]
        merged = mark = refined = None
    present = all(not m.qweight.is_meta and m.qweight.numel() for m in layers.values())
    marks: tuple[str, ...] = () if mark is None else (mark,)
    if present:
        summaries = {name: summary(m.qweight) for name, m in layers.items()}
        stored_names = {name: m.stored_name or name for name, m in layers.items()}
        marks = tuple(fingerprints(summaries, str, stored_names))
    first = mark if mark in marks else next(iter(marks), None)
    return BaseIdentity(bits, group_size, first, merged, refined, marks)


def check_base(config: QALoRAConfig, base: BaseIdentity) -> None:
    """Write the base's identity into a new adapter's config, or compare it with a loaded one's.

    Raises:
        AdapterError: the adapter was trained on another base.
    """
    known = config.fingerprint is not None
    merged = config.base_merged if known else base.base_merged
    refined = config.base_refined if known else base.base_refined
    stated = BaseIdentity(config.bits, config.group_size, config.fingerprint, merged, refined)
    different = stated.difference(base)
    if different is not None:
        raise AdapterError(
            f"{ADAPTER_CONFIG_FILE}: {different}: the adapter belongs to a base with {different}="
            f"{getattr(stated, different)!r}, found a base with {different}="
            f"{getattr(base, different)!r}. Load the base that the adapter was trained on, "
            "quantized in the same way"
        )
    for name in ("bits", "group_size", "fingerprint"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(base, name))
    config.base_merged, config.base_refined = merged, refined
