"""The KL divergence of a model's next-token distributions from those of another, as a loss."""

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError

_ROWS = 512  # tokens whose logits are compared at a time: fp32 over a whole vocabulary


class _Divergence(torch.autograd.Function):
    """Return the mean of KL(teacher || student) over rows of logits, its gradient made at once.

    d KL / d logits = softmax(student) - softmax(teacher): in one pass no fp32 copy of all logits
    outlives the forward.
    """

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        gradient, total = torch.empty_like(student), torch.zeros((), dtype=torch.float64)
        for start in range(0, len(student), _ROWS):
            part = slice(start, start + _ROWS)
            ours = student[part].float().log_softmax(-1)
            theirs = teacher[part].float().log_softmax(-1)
            wanted = theirs.exp()
            total += (wanted * theirs.sub_(ours)).sum().item()
            gradient[part] = ours.exp_().sub_(wanted).div_(len(student))
        ctx.save_for_backward(gradient)
        return (total / len(student)).float()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (made,) = ctx.saved_tensors
        return made * gradient.to(made.dtype), None


def divergence(student: nn.Module, teacher: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher || student) of the next tokens of ids [B, T], in nats a token."""
    with torch.no_grad():
        wanted = teacher(input_ids=ids).logits
    found = student(input_ids=ids).logits
    return _Divergence.apply(found.flatten(0, -2), wanted.flatten(0, -2))


def check_predicts(model: nn.Module) -> None:
    """Refuse a model without next-token distributions.

    Raises:
        ConfigError: it has no output embeddings.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ConfigError(
            f"{type(model).__name__} has no output embeddings, so there are no next-token "
            "distributions to refine on or to choose bits by: leave these options out"
        )
