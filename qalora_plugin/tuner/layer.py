"""`QALoRALinear`: adapters on a quantized linear layer, folded into it in training.

    offsets' = offsets + scaling * (B A)^T              adapt="zeros"
    scales'  = scales * (1 + scaling * (B A)^T)         adapt="scales"

(arXiv 2309.14717, eq. 5-7; `qalora_kernels.fold` is the one owner of the formula, `names` that of
the names of A and B.) Training folds on every forward, merging folds once: the same function on
the same numbers, so the merged layer computes what was trained, bit for bit.
"""

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from qalora_kernels import LowRank, PackedWeight
from qalora_kernels.groups import expand

from ..checkpoint.validate import bad_values
from ..distributed.sharding import is_sharded
from ..errors import AdapterError
from ..layers.linear import QuantLinear
from ..layers.sharded import ShardedQuantLinear
from .config import QALoRAConfig
from .names import ADAPT_PARTS, MATRICES

BASE = "__base__"  # PEFT's name, in mixed batches, for no adapter at all
_DIVERGED = "training diverged. Go back to an earlier checkpoint, or lower the learning rate"


def _uniform(shape: tuple[int, int], bound: float, seed: int, key: str) -> torch.Tensor:
    """Draw fp32 values in [-bound, bound) that depend on seed and key only, on every device."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    values = torch.empty(shape, dtype=torch.float32, device="cpu")
    return values.uniform_(-bound, bound, generator=generator)


def _as_linear(weight: torch.Tensor) -> nn.Linear:
    """Make an nn.Linear of this weight [out, in], on meta, so that it draws no random numbers."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    # PEFT has FSDP shard every trainable module without children by itself, and whole again only
    # while that one is called; A and B are never called, but read by the layer that holds them
    linear.not_a_leaf = nn.Module()
    return linear


class QALoRALinear(nn.Module, BaseTunerLayer):
    """A `QuantLinear` and its adapters, whose A and B are made and loaded in fp32.

    `name` is the layer's in the base model: patterns match it, the initialisation depends on it.
    """

    adapter_layer_names = tuple(name for pair in MATRICES.values() for name in pair)
    other_param_names = ("r", "scaling", "qalora_dropout")
    active_adapters: list[str]  # PEFT's property

    def __init__(self, base_layer: QuantLinear, adapter_name: str, config: QALoRAConfig, name: str):
        super().__init__()
        self.base_layer = base_layer
        self.in_features = base_layer.in_features
        self.out_features = base_layer.out_features
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ModuleDict())
        self.qalora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[torch.Tensor, torch.Tensor] | None = None
        self.additive = False
        """Whether to add the adapter's output instead of folding it in: slower, less exact."""
        self.train(base_layer.training)
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config: QALoRAConfig, name: str) -> None:
        """Add an adapter to the layer `name` of the base model; B is zero, so nothing changes yet.

        A is uniform, within 1/sqrt(K) (LoRA's own bound) for the offsets and 1 for the scales: a
        step of B then moves a weight as far as it does in LoRA, as pool(x) is a sum, and the
        scales' change is relative to weights of about 1/sqrt(K) (docs/adapt_modes.md has a sweep).
        """
        r, scaling = config.rank_and_scaling(name)
        spec, device = self.base_layer.spec, self.base_layer.qweight.device
        if device.type == "meta":  # its weights come from rank 0 later (FSDP)
            device = torch.device("cpu")
        self.r[adapter_name] = r
        self.scaling[adapter_name] = scaling
        for part in ADAPT_PARTS[config.adapt]:
            name_a, name_b = MATRICES[part]
            bound = 1 / math.sqrt(spec.in_features) if part == "zeros" else 1.0
            a = _uniform((r, spec.num_groups), bound, config.seed, f"{name}.{name_a}")
            b = torch.zeros(spec.out_features, r, dtype=torch.float32, device="cpu")
            if not config.init_lora_weights:
                b = _uniform((len(b), r), 1 / math.sqrt(r), config.seed, f"{name}.{name_b}")
            getattr(self, name_a)[adapter_name] = _as_linear(a.to(device))
            getattr(self, name_b)[adapter_name] = _as_linear(b.to(device))
        dropout = nn.Dropout(config.lora_dropout)
        self.qalora_dropout[adapter_name] = dropout.train(self.training)

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's: PEFT would answer with `qweight`, to whose dtype T5 casts inputs."""
        return self.base_layer.weight

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # PEFT casts loaded adapters to this dtype, which rounds A and B
        device, _ = super()._get_base_layer_device_and_dtype(base_layer)
        return device, None

    def extra_repr(self) -> str:
        """Tell rank, mode and scaling of each adapter; the grid is the base layer's."""
        return ", ".join(
            f"{name}: r={rank}, adapt={self._adapt(name)}, scaling={self.scaling[name]:g}"
            for name, rank in self.r.items()
        )

    def _adapt(self, adapter_name: str) -> str:
        """Return the mode of an adapter, by the matrices that it has."""
        held = {part for part, (a, _) in MATRICES.items() if adapter_name in getattr(self, a)}
        return next(adapt for adapt, parts in ADAPT_PARTS.items() if set(parts) == held)

    def matrices(self, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (attribute, weight) of each matrix that an adapter has here."""
        for attribute in self.adapter_layer_names:
            holder = getattr(self, attribute)
            if adapter_name in holder:
                yield attribute, holder[adapter_name].weight

    def change(self, part: str, adapters: Iterable[str]) -> LowRank | None:
        """Return what adapters change together in one part, None if they leave it alone.

        Under ZeRO-3 and FSDP its matrices are this rank's parts.
        """
        a, b = (getattr(self, attribute) for attribute in MATRICES[part])
        names = [name for name in adapters if name in a]
        parts = [LowRank(a[name].weight, b[name].weight, self.scaling[name]) for name in names]
        if len(parts) <= 1:
            return parts[0] if parts else None
        # joined along the rank
        joined = torch.cat([part.a.double() for part in parts])
        scaled = torch.cat([part.b.double() * part.factor for part in parts], dim=1)
        return LowRank(joined, scaled, 1.0)

    def forward(self, x: torch.Tensor, adapter_names: list[str] | None = None) -> torch.Tensor:
        """Compute the layer with its active adapters.

        Args:
            x: [..., K], any float dtype.
            adapter_names: one adapter, or "__base__", for each x[i]: a mixed batch.

        Returns:
            [..., N] in the dtype of x, or of autocast where that is on.

        Raises:
            ValueError: a mixed batch on a merged layer, or names and rows differ in number.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)
        if adapter_names is not None:
            return self._mixed(x, adapter_names)
        if self.merged:
            return self.base_layer(x)
        return self._adapted(x, self.active_adapters)

    def _adapted(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        if self.additive or any(self._drops(name) for name in adapters):
            return self._added(x, adapters)
        zeros, scale = self.change("zeros", adapters), self.change("scales", adapters)
        return self.base_layer(x, zeros=zeros, scale=scale)

    def _drops(self, adapter_name: str) -> bool:
        if adapter_name not in self.qalora_dropout:
            return False
        dropout = self.qalora_dropout[adapter_name]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

    def _added(self, x: torch.Tensor, adapters: list[str]) -> torch.Tensor:
        """Compute base(x) + scaling * dropout(pool(x)) A^T B^T + x (W * scaling * (B A)^T)^T."""
        base = self.base_layer
        y = base(x)
        dtype = torch.promote_types(y.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x, total = x.to(y.dtype).to(dtype), y.to(dtype)
            for name in adapters:
                zeros, scale = self.change("zeros", [name]), self.change("scales", [name])
                if zeros is not None:
                    pooled = self.qalora_dropout[name](base.pool(x))
                    low = pooled @ zeros.a.to(dtype).t() @ zeros.b.to(dtype).t()
                    total = total + zeros.factor * low
                if scale is not None:
                    change = scale.a.to(dtype).t() @ scale.b.to(dtype).t()
                    spread = expand(change, base.g_idx, base.spec.group_size, base.in_features)
                    total = total + scale.factor * (x @ (base.packed.dequantize(dtype) * spread))
        return total.to(y.dtype)

    def _mixed(self, x: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        if self.merged:
            raise ValueError(
                "adapter_names cannot be used while adapters are merged; call unmerge_adapter first"
            )
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names must name an adapter for each row of the batch: expected {len(x)} "
                f"names, found {len(adapter_names)}"
            )
        order: list[int] = []
        outputs = []
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, wanted in enumerate(adapter_names) if wanted == name]
            order += rows
            outputs.append(self._adapted(x[rows], [] if name == BASE else [name]))
        return torch.cat(outputs)[torch.tensor(order, device=x.device).argsort()]

    def check_merge(self, adapter_names: list[str] | None = None, name: str = "") -> None:
        """Check that `merge` would succeed; `name`, of this layer, is for its message."""
        asked = self.active_adapters if adapter_names is None else adapter_names
        added = [n for n in asked if n in self.scaling and n not in self.merged_adapters]
        if added:
            self._folded(self.merged_adapters + added, name)

    def _check_matrices(self, adapter_name: str, name: str) -> None:
        """Refuse to merge what is not there, or is not finite."""
        for attribute, weight in self.matrices(adapter_name):
            where = f"{name}.{attribute}.{adapter_name}.weight".removeprefix(".")
            if is_sharded(weight) or weight.dim() != 2 or weight.numel() == 0 or weight.is_meta:
                raise AdapterError(
                    f"{where}: expected a matrix, found shape {tuple(weight.shape)} on "
                    f"{weight.device}: it is partitioned (ZeRO-3, FSDP) or not loaded. Save the "
                    "adapter and merge the saved one with `qalora merge`"
                )
            if not weight.isfinite().all():
                raise AdapterError(f"{where}: holds NaN or infinity: {_DIVERGED}")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base layer's scales and offsets; `unmerge` undoes it exactly.

        Args:
            safe_merge: PEFT's switch for a check that is always made here.
            adapter_names: which; None for the active ones.

        Raises:
            AdapterError: A or B is not a whole matrix (ZeRO-3 leaves shape (0,)), or holds NaN or
                infinity; no checkpoint could hold the merged numbers (`validate.bad_values`); or
                the base was loaded to be sharded.
                Nothing has changed then.
        """
        asked = dict.fromkeys(check_adapters_to_merge(self, adapter_names))  # each once
        names = [n for n in asked if n in self.scaling]
        if not names:
            return
        base, own, merged = self.base_layer, self.own_grid(), self.merged_adapters + names
        base.scales, base.offsets = self._folded(merged)
        self._unmerged = own
        self.merged_adapters = merged

    def own_grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the base layer's own scales and offsets, whatever is merged."""
        base = self.base_layer
        if self._unmerged is None:
            return base.scales, base.offsets
        scales, offsets = self._unmerged
        # the model may have moved to another device since
        return scales.to(base.qweight.device), offsets.to(base.qweight.device)

    def merged_grid(self, name: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scales and offsets that merging the active adapters gives, and merge nothing.

        Args:
            name: of this layer, for messages.

        Raises:
            AdapterError: as `merge`.
        """
        return self._folded([n for n in self.active_adapters if n in self.scaling], name)

    def _folded(self, adapters: list[str], name: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Return scales and offsets with these adapters and no others; errors as in `merge`."""
        for adapter_name in adapters:
            self._check_matrices(adapter_name, name)
        base = self.base_layer
        if isinstance(base, ShardedQuantLinear):
            raise AdapterError(
                f"{name or 'the layer'}: expected a base that is whole in this process, found one "
                "that was loaded to be sharded (ZeRO-3, FSDP). Save the adapter, merge the saved "
                "one with `qalora merge`, and load the result"
            )
        with torch.no_grad():
            zeros, scale = self.change("zeros", adapters), self.change("scales", adapters)
            own = PackedWeight(base.qweight, *self.own_grid(), base.g_idx, base.spec)
            merged = own.fold(zeros, scale)
        scales, offsets = merged.scales, merged.offsets
        bad = bad_values(scales, offsets)
        if bad is not None:
            where = f"{name}: merging {adapters}".removeprefix(": ")
            raise AdapterError(
                f"{where}: {bad}, once rounded to {base.spec.stored_dtype}: {_DIVERGED}"
            )
        return scales, offsets

    def unmerge(self) -> None:
        """Put the base layer's own scales and offsets back, bit for bit."""
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.base_layer
        base.scales, base.offsets = self.own_grid()
        self._unmerged = None
        self.merged_adapters = []
