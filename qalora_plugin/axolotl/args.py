"""The `qalora:` block of an Axolotl recipe, as pydantic models that Axolotl validates."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..checkpoint.config import QUANT_METHOD
from ..checkpoint.format import format_named, formats
from ..tuner.parameter_groups import SCALE_LR_RATIO


class QALoRABlock(BaseModel):
    """Keys below `qalora:`. Axolotl's own `lora_*` keys keep their meaning beside it."""

    model_config = ConfigDict(extra="forbid")

    bits: Literal[2, 3, 4, 8] = Field(
        default=4, description="Width of the base's integers. Ignored for a quantized base."
    )
    group_size: int = Field(
        default=32,
        ge=-1,
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
        default="gptq",
        description="How a 16-bit base is quantized: with calibration, or data-free.",
    )
    desc_act: bool = Field(default=False, description="Quantize with act-order (g_idx).")
    zero_points: Literal["real", "integer"] = Field(
        default="real",
        description="integer: a base that the stock GPTQ format can hold (for adapt: scales).",
    )
    offsets_at: Literal["middle", "minimum"] = Field(
        default="middle",
        description="Which weight of a group fp16 holds; minimum: what GGUF stores, for llama.cpp.",
    )
    modules_to_not_convert: list[str] | None = Field(
        default=None,
        description="Modules of the base that stay unquantized; default: the output head.",
    )
    calibration: str | None = Field(
        default=None,
        description="Text for GPTQ, .txt or .jsonl; default: samples of the training set.",
    )
    calibration_samples: int = Field(
        default=128, ge=1, description="Calibration sequences for GPTQ."
    )
    calibration_seq_len: int | None = Field(
        default=None,
        ge=8,
        description="Their length in tokens; default: sequence_len, at most 2048.",
    )
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
        "it to output_dir/merged-FORMAT (gguf: output_dir/merged.gguf).",
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
    def _check_offsets_at(self) -> Self:
        if self.offsets_at == "minimum" and self.zero_points == "integer":
            raise ValueError(
                "qalora: offsets_at: minimum does not go with zero_points: integer, whose minima "
                "are in general no fp16 numbers; remove one of the two"
            )
        return self

    @model_validator(mode="after")
    def _check_quantizing(self) -> Self:
        if self.group_size == 0:
            raise ValueError(
                "qalora: group_size: expected a positive number, or -1 for one group per output, "
                "found 0"
            )
        if self.quantize_method == "rtn" and (self.desc_act or self.calibration):
            key = "desc_act" if self.desc_act else "calibration"
            raise ValueError(
                f"qalora: {key} does not go with quantize_method: rtn, which reads no calibration "
                f"data; remove {key}, or use quantize_method: gptq"
            )
        return self

    @model_validator(mode="after")
    def _check_formats(self) -> Self:
        chosen = [name for name in self.merge_formats if name != QUANT_METHOD]
        known = [format.name for format in formats()]
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
            if self.adapt not in format.adapts:
                raise ValueError(
                    f"qalora: merge_formats: {format.name} does not go with adapt: {self.adapt}: "
                    + format.advice
                )
        return self


class QALoRAArgs(BaseModel):
    """What the plugin adds to Axolotl's config."""

    qalora: QALoRABlock = Field(
        default_factory=QALoRABlock,
        description="QA-LoRA settings, for `adapter: qalora`.",
    )
