"""Compile every Triton kernel for an NVIDIA GPU that need not be there; run by the test beside it.

    python compile_for_gpu.py CAPABILITY BITS...      for example: compile_for_gpu.py 90 3 4
    python compile_for_gpu.py candidates:I/N CAPABILITY BITS     the products, as tuning tries them:
                                                                every N-th from the I-th on

Every operator is called as in training and generation, on CPU tensors, with launching replaced by
compiling down to machine code (ptxas comes with Triton). Prints one JSON line a kernel.
"""

import importlib
import json
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from qalora_kernels import PackedWeight, QuantSpec


class _AbsentGPU:
    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(kernel, grid, *args, **constants):
    compiled = kernel.warmup(*args, grid=grid, **constants)
    ptx = compiled.asm["ptx"]
    line = {
        "kernel": kernel.fn.__name__,
        "machine_code": len(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "wgmma": "wgmma.mma_async" in ptx,
        "mma": "wgmma.mma_async" in ptx or "mma.sync" in ptx,
        "local_memory": ".local" in ptx,
        "plan": PLAN,
    }
    print(json.dumps(line), flush=True)


def zeros(spec, act_order=False):
    qweight = torch.zeros(spec.packed_rows, spec.out_features, dtype=torch.int32)
    grid = torch.ones(spec.num_groups, spec.out_features)
    g_idx = (torch.arange(spec.in_features) // spec.group_size).int() if act_order else None
    return PackedWeight(qweight, grid, grid, g_idx, spec)


def call_every_operator(backend, bits):
    k, n, half = 1024, 512, torch.bfloat16
    bias = torch.ones(n, dtype=half)
    for act_order in (False, True):
        weight = zeros(QuantSpec(bits, 32, k, n), act_order)
        backend.dequantize(weight, torch.empty(k, n, dtype=half))
        for m in (1, 16):
            x, dy = torch.ones(m, k, dtype=half), torch.ones(m, n, dtype=half)
            backend.linear(x, weight, bias)
            if m == 16:
                backend.grad_input(dy, weight)
        backend.pool(x, weight.g_idx, 32)
        backend.weighted_group_grad(dy, x, weight)


def call_candidates(backend, tuning, bits, first, step):
    global PLAN
    k, n, half = 1024, 512, torch.bfloat16
    weight = zeros(QuantSpec(bits, 32, k, n))
    candidates = tuning._shipped()["candidates"].items()
    entries = {
        (op, tuple(entry.items()))  # several buckets may have the same candidate
        for op, buckets in candidates
        for bucket in buckets.values()
        for entry in bucket
    }
    for op, items in sorted(entries)[first::step]:
        entry = dict(items)
        PLAN = {"op": op, "bits": bits, **entry}
        tuning.plan = lambda *_, entry=entry: tuning.Plan(**entry)
        rows = torch.ones(entry["block_m"], k if op == "linear" else n, dtype=half)
        bias = (None,) if op == "linear" else ()
        getattr(backend, op)(rows, weight, *bias)


PLAN = None  # which candidate is being compiled

if __name__ == "__main__":
    candidates = sys.argv[1].startswith("candidates:")
    capability, *all_bits = sys.argv[1 + candidates :]
    CAPABILITY = int(capability)
    driver.set_active(_AbsentGPU())
    modules = {
        name: importlib.import_module(f"qalora_kernels.backends.triton.{name}")
        for name in ("dequantize", "matmul", "groups", "tuning")
    }
    defaults = modules["tuning"]._shipped()["untuned_defaults"][capability[0]]
    modules["tuning"].splits_to_fill = lambda device, warps: 2
    for name, module in modules.items():
        module.untuned = lambda op, device: defaults[op]
        if name != "tuning":
            module.launch = compile_only
    backend = importlib.import_module("qalora_kernels.backends.triton")
    for bits in map(int, all_bits):
        if candidates:
            part = map(int, sys.argv[1].partition(":")[2].split("/"))
            call_candidates(backend, modules["tuning"], bits, *part)
        else:
            call_every_operator(backend, bits)
