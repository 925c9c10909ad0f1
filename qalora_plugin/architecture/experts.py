"""A mixture's experts as plain linear layers, one a projection, under the checkpoint's names.

transformers keeps the experts of a layer as two tensors [E, out, in] and fuses the files' tensors
into them while it loads. Quantized, every projection of every expert is a layer of its own, as the
files have it: it is then loaded, calibrated, adapted, merged and exported as any other layer is.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.integrations import moe

FUSED = ("gate_up_proj", "down_proj")
"""transformers' names of the fused parameters, [E, 2I, H] and [E, H, I]."""


class ExpertNames(NamedTuple):
    """What an expert's linear layers are called: "w1", "w3" and "w2" in Mixtral."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class Expert(nn.Module):
    """One expert: down(act(gate(x)) * up(x)).

    Args:
        names: of its linear layers.
        sizes: (H, I), the widths outside and inside of the expert.
        act_fn: of the model.
        like: a tensor that has the dtype and the device.
    """

    def __init__(
        self,
        names: ExpertNames,
        sizes: tuple[int, int],
        act_fn: Callable[[torch.Tensor], torch.Tensor],
        like: torch.Tensor,
    ) -> None:
        super().__init__()
        self.names = names
        outer, inner = sizes
        for name, wide in ((names.gate, (outer, inner)), (names.up, (outer, inner))):
            self.add_module(name, nn.Linear(*wide, False, like.device, like.dtype))
        self.add_module(names.down, nn.Linear(inner, outer, False, like.device, like.dtype))
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [M, H] from the tokens x [M, H] that were routed here; M may be 0."""
        output: torch.Tensor = self.get_submodule(self.names.down)(self.inner(x))
        return output

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what the last layer reads, [M, I], from x [M, H]."""
        gate, up = self.get_submodule(self.names.gate), self.get_submodule(self.names.up)
        product: torch.Tensor = self.act_fn(gate(x)) * up(x)
        return product


class Experts(nn.Module):
    """The experts of one layer, as children "0", "1", ...; it stands for transformers' module.

    It is called as that is, with what the router chose. In training every expert is called, if
    need be with no token: then all ranks call the same modules, and every adapter has a gradient.

    Args:
        fused: transformers' module, whose numbers are dropped.
        names: of the linear layers.
    """

    calls_all = False
    """Whether to call experts without a token in evaluation too, as sharded ones have to be."""

    is_guarded = True
    """Whether transformers looks at these layers' `weight`, and so at the guard, without us."""

    def __init__(self, fused: nn.Module, names: ExpertNames) -> None:
        super().__init__()
        up, down = (fused.get_parameter(name) for name in FUSED)
        self.num_experts: int = up.shape[0]
        sizes = (down.shape[1], down.shape[2])
        act_fn = fused.act_fn
        for index in range(self.num_experts):
            self.add_module(str(index), Expert(names, sizes, act_fn, up))  # type: ignore[arg-type]
        self.train(fused.training)
        self._fused = (fused.to("meta"),)  # in a tuple: no module of this one

    def fuse(self) -> nn.Module:
        """Return transformers' module with the weights of these experts, which have to be dense."""
        (fused,) = self._fused
        weights = [
            [e.get_submodule(n).get_parameter("weight") for n in e.names] for e in self.experts
        ]
        stacks = (
            torch.stack([torch.cat((gate, up)) for gate, up, _ in weights]),
            torch.stack([down for *_, down in weights]),
        )
        for name, stack in zip(FUSED, stacks, strict=True):
            setattr(fused, name, nn.Parameter(stack.detach()))
        return fused.train(self.training)

    @property
    def experts(self) -> list[Expert]:
        """The experts, in the order of the router's outputs."""
        return [cast(Expert, module) for module in self.children()]

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Compute the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, k], the experts of each token.
            top_k_weights: [T, k], float.

        Returns:
            [T, H] in the dtype of `hidden_states`.
        """
        order, rows = self.route(hidden_states, top_k_index)
        everything = self.calls_all or (self.training and torch.is_grad_enabled())
        everything = everything or not len(hidden_states)
        outputs = [
            expert(part)
            for expert, part in zip(self.experts, rows, strict=True)
            if everything or len(part)
        ]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        # each token's k outputs side by side, in the order of its choices: no sum depends on chance
        chosen = torch.cat(outputs)[back].view(*top_k_index.shape, -1)
        return (chosen * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

    def route(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Sort the tokens by expert.

        Returns:
            The place in `top_k_index`, flat, of every row, [T * k]; and each expert's rows [M, H].
        """
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=self.num_experts).tolist()
        return order, hidden_states[order // top_k_index.shape[-1]].split(counts)


def is_fused(module: nn.Module) -> bool:
    """Say whether a module is a mixture's fused experts that `Experts` computes the same as.

    That is transformers' own layout: gate and up beside each other, no biases, no other gating.
    """
    wanted = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    return (
        tuple(name for name, _ in module.named_parameters()) == FUSED
        and all(getattr(module, name, None) is value for name, value in wanted.items())
        and not getattr(module, "has_post_expert_norm", False)
        and getattr(type(module), "_apply_gate", None) is moe._default_apply_gate
    )


def without_fusing(conversions: Iterable[object], experts: Iterable[str]) -> list[object]:
    """Return transformers' conversions of a model less those that fuse the experts named here.

    Args:
        conversions: of `get_model_conversion_mapping`.
        experts: names of the `Experts` in the model.
    """
    fused = [f"{name}.{parameter}" for name in experts for parameter in FUSED]
    return [
        entry
        for entry in conversions
        if not isinstance(entry, WeightConverter)
        or not any(name.endswith(target) for name in fused for target in entry.target_patterns)
    ]


def find_experts(model: nn.Module) -> dict[str, Experts]:
    """Return a model's unfused experts by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
