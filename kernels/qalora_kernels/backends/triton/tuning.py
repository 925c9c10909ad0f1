"""Plans of matrix products: fused or through the library, with which blocks, and their tuning.

A plan is looked up by GPU name, operator, dtype, bits, group_size, N, K and a bucket of M: first in
`tuning.json` (what we measured), then in the user's cache file, else it is measured once on the
call's own tensors and written to that cache. Where nothing may be measured (the CPU, a CUDA graph
under capture, tuning switched off) the untuned default of the GPU's generation serves.

QALORA_TUNING_CACHE names the cache file (default: tuning.json in the user's cache directory, see
`cache`); "off" means neither a cache nor measuring. Plans change the order of a sum, nothing else.
"""

import json
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from ... import cache
from ...checks import capturing
from ...packed import PackedWeight

CACHE_VARIABLE = "QALORA_TUNING_CACHE"
BUCKETS = (1, 16, 32, 64, 128, 256, 512)
"""M is rounded up to one of these; above the last, the library's product always wins."""

_logger = logging.getLogger(__name__)
_plans: dict[tuple[Any, ...], "Plan"] = {}


@dataclass(frozen=True)
class Plan:
    """The plan of a product: run by the library, or fused with these blocks.

    Rows, outputs, and elements of the reduction a step (units of packed words for `linear`);
    `splits` pieces of the reduction, 0 for as many as fill the GPU.
    """

    fused: bool = False
    block_m: int = 0
    block_out: int = 0
    block_in: int = 0
    splits: int = 0
    num_warps: int = 4
    num_stages: int = 2


LIBRARY = Plan()


@lru_cache(maxsize=1)
def _shipped() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("tuning.json").read_text(encoding="utf-8"))


def cache_file() -> Path | None:
    """Return the user's cache file, or None where tuning is off."""
    named = os.environ.get(CACHE_VARIABLE, "")
    if named:
        return None if named == "off" else Path(named)
    try:
        return cache.path("tuning.json")
    except OSError as error:
        warnings.warn(f"kernels are not tuned: {error}", RuntimeWarning, stacklevel=2)
        return None


def _cached(file: Path) -> dict[str, dict[str, Plan]]:
    """Return what the cache file holds, {GPU name: {key: plan}}; nothing if it cannot be read."""
    try:
        tuned = json.loads(file.read_text(encoding="utf-8"))["tuned"]
        # a plan of another release may have other fields
        return {gpu: {key: Plan(**p) for key, p in plans.items()} for gpu, plans in tuned.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("ignoring the tuning cache %s: %s", file, error)
        return {}


def _remember(file: Path, gpu: str, key: str, plan: Plan) -> None:
    """Add one plan to the cache file; of two writers the later one wins."""
    tuned = _cached(file)
    tuned.setdefault(gpu, {})[key] = plan
    try:
        text = json.dumps({"tuned": tuned}, indent=1, sort_keys=True, default=asdict)
        cache.write(file, text.encode())
    except OSError as error:
        _logger.warning("cannot write the tuning cache %s: %s", file, error)


@lru_cache
def untuned(op: str, device: torch.device) -> dict[str, Any]:
    """Return the untuned default of the device's generation.

    It is blocks, or for the products a plan for each bucket of M that is fused.
    """
    defaults = _shipped()["untuned_defaults"]
    generation = "cpu"
    if device.type == "cuda":
        generation = str(torch.cuda.get_device_capability(device)[0])
    return defaults.get(generation, defaults["other"])[op]


def _measure(op: str, device: torch.device, bucket: int, run: Callable[[Plan], Any]) -> Plan:
    """Return the fastest candidate; each is run with a cold L2 cache.

    Raises:
        torch.OutOfMemoryError: no room to measure in.
    """
    candidates = [Plan(**entry) for entry in _shipped()["candidates"][op].get(str(bucket), [])]
    times: dict[Plan, float] = {}
    with torch.cuda.device(device):
        for plan in [LIBRARY, *candidates]:
            try:
                times[plan] = triton.testing.do_bench(
                    lambda plan=plan: run(plan), warmup=5, rep=20, return_mode="median"
                )
            except OutOfResources as error:
                _logger.info("%s: %s does not fit this GPU: %s", op, plan, error)
    return min(times, key=times.__getitem__)


def plan(op: str, rows: torch.Tensor, weight: PackedWeight, run: Callable[[Plan], Any]) -> Plan:
    """Return the plan for `op` ("linear" or "grad_input") on activations `rows` [M, ...].

    Args:
        op: name of the operator in the tables.
        rows: the activations; device, dtype and M are read.
        weight: the layer; its spec is read, and whether g_idx shuffles the groups.
        run: runs the operator under a plan; measured where no table has the shape.
    """
    m, device, spec = rows.shape[0], rows.device, weight.spec
    if m == 0 or m > BUCKETS[-1]:
        return LIBRARY
    bucket = next(size for size in BUCKETS if size >= m)
    act_order, n, k = weight.g_idx is not None, spec.out_features, spec.in_features
    key = (device, op, rows.dtype, spec.bits, spec.group_size, n, k, act_order, bucket)
    found = _plans.get(key)
    if found is None:
        found = Plan(**untuned(op, device).get(str(bucket), {}))
        if device.type == "cuda":
            looked_up = _look_up_or_measure(key, run)
            if looked_up is None:
                return found  # not kept: a later call may be free to measure
            found = looked_up
        _plans[key] = found
    return found


def _look_up_or_measure(shape: tuple[Any, ...], run: Callable[[Plan], Any]) -> Plan | None:
    """Return a measured plan, old or new; None where there is none and none may be made now."""
    device, op, dtype, bits, group_size, n, k, act_order, bucket = shape
    key = f"{op} {str(dtype)[6:]} bits={bits} group_size={group_size} N={n} K={k} M<={bucket}"
    key += " act_order" if act_order else ""
    gpu = torch.cuda.get_device_name(device)
    shipped = _shipped()["tuned"].get(gpu, {}).get(key)
    if shipped is not None:
        return Plan(**shipped)
    file = cache_file()
    known = None if file is None else _cached(file).get(gpu, {}).get(key)
    if known is not None:
        return known
    if file is None or capturing(device):
        return None
    try:
        measured = _measure(op, device, bucket, run)
    except torch.OutOfMemoryError:
        _logger.warning("no memory to tune %s: the untuned default serves", key)
        return None
    _logger.info("tuned %s on %s: %s", key, gpu, measured)
    _remember(file, gpu, key, measured)
    return measured


def splits_to_fill(device: torch.device, warps: int) -> int:
    """Return the pieces of the reduction that give every multiprocessor about sixteen warps.

    `warps` is what one piece has, in all its programs.
    """
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(64, 16 * processors // warps))
