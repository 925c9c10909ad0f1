"""The `qalora:` block of an Axolotl recipe, as pydantic models that Axolotl validates."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from qalora_kernels.stored import QUANT_METHOD

from ..checkpoint.format import exports, format_named
from ..quantize.options import OptionError, QuantizeOptions
from ..quantize.refine import RefineSettings
from ..tuner.parameter_groups import SCALE_LR_RATIO


class QALoRABlock(BaseModel):
    """Keys below `qalora:`. Axolotl's own `lora_*` keys keep their meaning beside it."""

    model_config = ConfigDict(extra="forbid")

    bits: Literal[2, 3, 4, 8, "auto"] = Field(
        default=4,
        description="Width of the base's integers; auto: of each layer by measured sensitivity. "
        "Ignored for a quantized base.",
    )
    target_bits: float | None = Field(
        default=None, description="With bits: auto, the size: as so many bits everywhere."
    )
    group_size: int = Field(
        default=32,
        description="Inputs that share a scale and an offset; -1 for one group per output. "
        "Ignored for a quantized base.",
    )
    adapt: Literal["zeros", "scales", "both"] = Field(
        default="zeros",
        description="What the adapter changes: the offsets (the paper), the scales, or both.",
    )
    scale_learning_rate_ratio: float | None = Field(
        default=None,
        gt=0,
        description="Learning rate of the scales' part over learning_rate, for adapt: scales and "
        f"both; default {SCALE_LR_RATIO:g}, and 1 with LoRA+ or an optimizer without groups.",
    )
    quantize_method: Literal["gptq", "rtn"] = Field(
        default="gptq", description="How a 16-bit base is quantized: calibrated, or data-free."
    )
    desc_act: bool = Field(default=False, description="Quantize with act-order (g_idx).")
    zero_points: Literal["real", "integer", "none"] = Field(
        default="real",
        description="integer: a base that stock GPTQ can hold (for adapt: scales); none: likewise, "
        "symmetric.",
    )
    offsets_at: Literal["middle", "minimum"] = Field(
        default="middle",
        description="Which weight of a group fp16 holds; minimum: what GGUF stores, for llama.cpp.",
    )
    modules_to_not_convert: list[str] | None = Field(
        default=None, description="Modules that stay unquantized; default: the output head."
    )
    calibration: str | None = Field(
        default=None, description="Text for GPTQ, .txt or .jsonl; default: the training set."
    )
    calibration_samples: int = Field(default=128, ge=1, description="Sequences for GPTQ.")
    calibration_seq_len: int | None = Field(
        default=None,
        ge=8,
        description="Their tokens; default: sequence_len, at most what the model takes, and 2048.",
    )
    refine: bool = Field(
        default=False,
        description="After GPTQ train all scales and offsets against the 16-bit model.",
    )
    refine_steps: int = Field(default=RefineSettings.steps, ge=1, description="Steps of that.")
    refine_rate: float = Field(
        default=RefineSettings.rate,
        description="Its peak learning rate, in quantization steps.",
    )
    refine_batch: int = Field(
        default=RefineSettings.batch, ge=1, description="Calibration sequences in a step."
    )
    refine_norms: bool = Field(default=False, description="Train the weights of norms too.")
    quantized_model_dir: str | None = Field(
        default=None,
        description="Folder of quantized bases, reused by later runs; "
        "default: quantized_bases beside output_dir.",
    )
    merge_on_finish: bool = Field(
        default=True, description="Write output_dir/merged when training ends."
    )
    merge_formats: list[str] = Field(
        default=["qalora"],
        description="What to write at the end: qalora (always: output_dir/merged), and exports of "
        "it to output_dir/merged-FORMAT (gguf: output_dir/merged.gguf). original: the base's own "
        "file, with the adapter in it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError(f"qalora: expected a block of keys, found {data!r}")
        unknown = sorted(set(data) - set(cls.model_fields))
        if unknown:
            raise ValueError(
                f"qalora: unknown key {', '.join(unknown)}; allowed are "
                f"{', '.join(sorted(cls.model_fields))}"
            )
        return data

    @model_validator(mode="after")
    def _check_quantizing(self) -> Self:
        default = "the training set" if self.quantize_method == "gptq" else None
        try:
            QuantizeOptions(calibration=self.calibration or default, **self._settings())
        except OptionError as error:
            raise ValueError(f"qalora: {error.spelled(_as_key)}") from None
        return self

    def _settings(self) -> dict[str, Any]:
        """Return all options that the block gives, also those that nothing will ask for."""
        refining = {n: getattr(self, n) for n in type(self).model_fields if n.startswith("refine")}
        return options_of(self.__dict__) | refining

    @model_validator(mode="after")
    def _check_formats(self) -> Self:
        chosen = [name for name in self.merge_formats if name != QUANT_METHOD]
        known = [format.name for format in exports()]
        if not set(known).issuperset(chosen):
            raise ValueError(
                f"qalora: merge_formats: expected some of {QUANT_METHOD}, {', '.join(known)}, "
                f"found {self.merge_formats}"
            )
        if chosen and not self.merge_on_finish:
            raise ValueError(
                f"qalora: merge_formats: {chosen} are exports of the merged model, and "
                "merge_on_finish: false makes none; remove one of the two"
            )
        for format in map(format_named, chosen):
            if (problem := format.adapt_problem(self.adapt)) is not None:
                raise ValueError(f"qalora: merge_formats: {problem}")
        return self


class QALoRAArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's config."""

    qalora: QALoRABlock = Field(
        default_factory=QALoRABlock, description="QA-LoRA settings, for `adapter: qalora`."
    )


def options_of(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `QuantizeOptions` that a `qalora:` block gives, calibration left out."""
    same = ("bits", "group_size", "desc_act", "zero_points", "offsets_at", "modules_to_not_convert")
    found = {"method": block.get("quantize_method"), **{name: block.get(name) for name in same}}
    if block.get("bits") == "auto" or block.get("target_bits") is not None:
        found["target_bits"] = block["target_bits"]
    if block.get("refine"):  # else in no key: bases made before it stay valid
        names = ("refine", *(f"refine_{field.name}" for field in fields(RefineSettings)))
        found |= {name: block[name] for name in names}
    return found


def _as_key(option: str, value: str | None) -> str:
    key = "quantize_method" if option == "method" else option
    return f"{key}: {value}" if value else key
