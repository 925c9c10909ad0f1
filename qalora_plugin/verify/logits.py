"""Compare whole models: the merged one, and base with adapter, built the way each is used."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..architecture.blocks import reads_text
from ..checkpoint.checkpoint import QuantizedCheckpoint
from ..errors import VerificationError
from ..hf.load import load_model
from ..merge.conventions import CONVENTIONS
from ..merge.pairing import LayerMerge
from ..merge.plan import MergePlan
from .additive import pooled_change

_TOKENS = 32
# Merged and additive models differ by the rounding of offsets and by fp32 arithmetic, a reference
# perhaps by bf16 arithmetic; a wrong convention is off by the adapter's whole effect, or more.
_ADDITIVE_SHARE = 0.1
_REFERENCE_SHARE = 0.5


@dataclass(frozen=True)
class LogitsReport:
    """Logits of merged and unmerged model on the same random tokens, fp32.

    Args:
        equal: whether they are equal to the bit (`torch.equal`).
        difference: the largest absolute difference.
        effect: the largest absolute change of a logit by the adapter's layers.
    """

    equal: bool
    difference: float
    effect: float

    def as_text(self) -> str:
        """Return one line for people."""
        how = "equal to the bit" if self.equal else f"differ by at most {self.difference:.3g}"
        return f"logits, merged against unmerged: {how} (adapter's effect {self.effect:.3g})"


def compare_logits(plan: MergePlan, merged: QuantizedCheckpoint) -> LogitsReport:
    """Load both models in fp32 and compare their logits on random tokens.

    An adapter of ours runs through PEFT, folded as in training: the logits must be equal to the
    bit. One from elsewhere runs by the additive formula of the code that trained it.

    Raises:
        VerificationError: they differ by more than rounding explains.
    """
    model = load_model(merged, trained_class(plan))
    ids = random_ids(model, 1, _TOKENS)
    merged_logits = logits_of(model, ids)
    base = _load_base(plan)
    base_logits = logits_of(base, ids)
    if plan.adapter.is_ours:
        unmerged = PeftModel.from_pretrained(base, str(plan.adapter.directory)).eval()
        unmerged_logits = logits_of(unmerged, ids)
    else:
        with added(base, plan, plan.convention):
            unmerged_logits = logits_of(base, ids)
    report = LogitsReport(
        equal=torch.equal(merged_logits, unmerged_logits),
        difference=_distance(merged_logits, unmerged_logits),
        effect=_distance(unmerged_logits, base_logits),
    )
    allowed = 0.0 if plan.adapter.is_ours else _ADDITIVE_SHARE * report.effect
    if not report.equal and not report.difference <= allowed:
        raise VerificationError(
            f"{merged.directory}: logits differ from those of base plus adapter by up to "
            f"{report.difference:.3g} (the adapter changes them by up to {report.effect:.3g}). "
            "Merge again."
        )
    return report


@dataclass(frozen=True)
class Reference:
    """The logits of the code that trained an adapter; `read_reference` makes one.

    Args:
        path: the file.
        ids: input_ids, int64 [B, T].
        logits: fp32 [B, T, V].
    """

    path: Path
    ids: torch.Tensor
    logits: torch.Tensor


def compare_reference(plan: MergePlan, merged: QuantizedCheckpoint, reference: Reference) -> None:
    """Hold the merged model against logits of the code that trained the adapter.

    Raises:
        VerificationError: they are of another shape than the model's, another convention explains
            them better than the one merged with, or none does.
    """
    ids, wanted = reference.ids, reference.logits
    base = _load_base(plan)
    size = _token_ids_of(base)
    if int(ids.max()) >= size or int(ids.min()) < 0:
        raise VerificationError(
            f"{reference.path}: input_ids: expected 0 to {size - 1}, the model's token ids, found "
            f"{int(ids.min())} to {int(ids.max())}. They are of another tokenizer."
        )
    of_base = logits_of(base, ids)
    if of_base.shape != wanted.shape:
        raise VerificationError(
            f"{reference.path}: logits: expected the shape {list(of_base.shape)} that the model's "
            f"have for these input_ids, found {list(wanted.shape)}. They are of another model."
        )
    effect = _distance(wanted, of_base)
    distances = {}
    if not plan.adapter.is_ours:
        for convention in CONVENTIONS:
            with added(base, plan, convention):
                distances[convention] = _distance(wanted, logits_of(base, ids))
    distances["merged"] = _distance(wanted, logits_of(load_model(merged, trained_class(plan)), ids))
    best = min(distances, key=distances.__getitem__)
    found = ", ".join(f"{name} {value:.3g}" for name, value in distances.items())
    found += f"; the adapter's effect: {effect:.3g}"
    if not distances[best] <= _REFERENCE_SHARE * effect:
        raise VerificationError(
            f"{reference.path}: its logits are not those of this base with this adapter under any "
            f"convention (distances: {found})."
        )
    if distances["merged"] > _REFERENCE_SHARE * effect:
        raise VerificationError(
            f"{reference.path}: its logits are those of the convention {best!r}, but the adapter "
            f"was merged with {plan.convention!r} (distances: {found}). Merge again with "
            f"--convention {best}."
        )


def read_reference(path: Path) -> Reference:
    """Read `input_ids` int64 [B, T] and `logits` [B, T, V] from a .safetensors file.

    Raises:
        VerificationError: it cannot be read, or does not hold them.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path}: cannot be read as safetensors ({error}).") from error
    ids, logits = tensors.get("input_ids"), tensors.get("logits")
    if ids is None or logits is None or ids.is_floating_point() or ids.dim() != 2 or 0 in ids.shape:
        found = ", ".join(f"{name} {t.dtype} {list(t.shape)}" for name, t in tensors.items())
        raise VerificationError(
            f"{path}: expected tensors input_ids [B, T] of integers and logits [B, T, V], found "
            f"{found or 'none'}. Save them from the code that trained the adapter."
        )
    return Reference(path, ids.long(), logits.float())


@contextmanager
def added(model: nn.Module, plan: MergePlan, convention: str | None) -> Iterator[None]:
    """Let a base's layers add, within the block, what the adapter adds if it pools in this way.

    `convention` None is ours, which sums over the base's groups.
    The adapter's whole tensors are put into the model too, and stay there.
    """
    _put_saved_tensors(model, plan)
    with torch.no_grad(), ExitStack() as hooks:
        for name, merge in plan.layers.items():
            matrices = plan.adapter.get_pair(merge.layer.keys["zeros"])
            add = partial(_add, merge, matrices, convention, plan.base.g_idx(name))
            layer = model.get_submodule(plan.trained.in_model(name))
            hooks.enter_context(layer.register_forward_hook(add))
        yield


def _add(
    merge: LayerMerge,
    matrices: tuple[torch.Tensor, torch.Tensor],
    convention: str | None,
    g_idx: torch.Tensor | None,
    layer: nn.Module,
    args: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    x = args[0].reshape(-1, args[0].shape[-1])
    return output + pooled_change(x, merge, matrices, convention, g_idx).view_as(output)


def _put_saved_tensors(model: nn.Module, plan: MergePlan) -> None:
    tied, still = (c.get("tie_word_embeddings") for c in (plan.base.reader.config, plan.config))
    for name, key in plan.dense.from_adapter.items():
        owner, _, leaf = plan.trained.in_model(name).rpartition(".")
        module = model.get_submodule(owner)
        value = plan.adapter.get(key).to(module.get_parameter(leaf))
        if tied != still:
            setattr(module, leaf, nn.Parameter(value))
        else:  # what is tied to it changes with it
            module.get_parameter(leaf).data = value


def trained_class(plan: MergePlan) -> str | None:
    """Return the class in which the adapter's layers have their names; None if it is any."""
    if plan.trained.architecture is not None:
        return plan.trained.architecture.class_name
    return next(iter(plan.config.get("architectures") or ()), None)


def _load_base(plan: MergePlan) -> Any:
    """Load the base as it was trained: with the merged model's vocabulary and whole tensors."""
    before, after = plan.base.reader.config, plan.config
    options: dict[str, Any] = {}
    if after.get("id2label") != before.get("id2label"):
        options["num_labels"] = len(after["id2label"])
    model: Any = load_model(plan.base, trained_class(plan), **options)
    if vocabulary(after) != vocabulary(before):
        model.resize_token_embeddings(vocabulary(after), mean_resizing=False)
    _put_saved_tensors(model, plan)
    return model


def vocabulary(config: dict[str, Any]) -> Any:
    """Return the size of the vocabulary that a config.json states, None if it states none."""
    return config.get("text_config", config).get("vocab_size")


def _token_ids_of(model: Any) -> int:
    """Return how many token ids a model knows; a VerificationError says that it reads none."""
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if size is None or not reads_text(model):
        raise VerificationError(
            f"{type(model).__name__}: expected a model that reads token ids, whose logits can be "
            "compared; this one reads none. Leave logits (--logits) and reference out."
        )
    return int(size)


def random_ids(model: nn.Module, rows: int, tokens: int) -> torch.Tensor:
    """Return token ids int64 [rows, tokens] of a model's vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, _token_ids_of(model), (rows, tokens), generator=generator)


@torch.no_grad()
def logits_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits in fp32: of every token, or of a classifier's classes.

    A decoder behind an encoder gets the same tokens.
    """
    config: Any = model.config
    more = {"decoder_input_ids": ids} if config.is_encoder_decoder else {}
    output = model(input_ids=ids, **more)
    return (output.logits if "logits" in output else output[0]).float()


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
