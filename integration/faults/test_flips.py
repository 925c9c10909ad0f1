"""One flipped bit in any file of a directory is found by whoever reads it.

A flip for every file by default; `make faults` makes 200 for each directory.
"""

import shutil
from collections import Counter

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qalora_plugin import merge_adapter, verify_merge
from qalora_plugin.checkpoint.checkpoint import open_quantized
from qalora_plugin.checkpoint.describe import describe
from qalora_plugin.checkpoint.kind import find_kind
from qalora_plugin.cli.inspect import main as inspect_export
from qalora_plugin.errors import QALoRAError
from qalora_plugin.formats.export import export_model
from qalora_plugin.hub.push import push

from .conftest import TIMES
from .processes import remove

DIRECTORIES = ("base", "adapter", "merged", "torchao", "mlx", "lora", "gptq", "compressed-tensors")


def _doors(name, directory, models, out):
    """What reads a directory, by name."""
    base, adapter, merged = models.base, models.adapter, models.merged
    load = AutoModelForCausalLM.from_pretrained
    both = {"inspect": lambda: _inspect(directory)}
    if name != "adapter":
        both["push"] = lambda: push(directory, "o/n", dry_run=True)
    found = {
        "base": {
            "merge": lambda: merge_adapter(adapter, out, directory),
            "verify": lambda: verify_merge(merged, adapter, directory),
            "export": lambda: export_model(directory, out, "torchao"),
            "load": lambda: load(directory),
        },
        "adapter": {
            "merge": lambda: merge_adapter(directory, out, base),
            "verify": lambda: verify_merge(merged, directory, base),
            "export": lambda: export_model(directory, out, "lora", base=base),
            "load": lambda: PeftModel.from_pretrained(load(base), directory),
        },
        "merged": {
            "verify": lambda: verify_merge(directory, adapter, base),
            "export": lambda: export_model(directory, out, "torchao"),
            "load": lambda: load(directory),
        },
        "gptq": {"load": lambda: load(directory), "open": lambda: open_quantized(directory)},
        "compressed-tensors": {"open": lambda: open_quantized(directory)},
    }
    return both | found.get(name, {})


def _inspect(directory):
    """Raise what inspecting finds."""
    if find_kind(directory).export is None:
        found = describe(directory)
    else:
        from argparse import Namespace

        failed = inspect_export(
            Namespace(model=str(directory), quick=False, accept_edits=False, json=True)
        )
        found = {"valid": not failed, "problem": "see above"}
    if not found["valid"]:
        raise QALoRAError(found["problem"])


@pytest.mark.parametrize("name", DIRECTORIES)
def test_flipped_bits(name, models, action_of, draw, tmp_path, show):
    """Any door finds a flip in any file, and says so in an error of ours."""
    if hasattr(models, name):
        original = getattr(models, name)
    else:
        act, original = action_of(name, tmp_path)
        act()
    directory, out = shutil.copytree(original, tmp_path / "copy"), tmp_path / "out"
    doors = _doors(name, directory, models, out)
    for go in doors.values():  # they take the directory as it is
        go()
        remove(out)
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != "README.md")
    counts = Counter()
    for number in range(max(TIMES, len(files))):
        path, door = files[number % len(files)], list(doors)[number % len(doors)]
        before = path.read_bytes()
        if not before:
            continue
        after = bytearray(before)
        place, bit = draw.randrange(len(after)), draw.randrange(8)
        after[place] ^= 1 << bit
        path.write_bytes(after)
        with pytest.raises(QALoRAError):
            doors[door]()
            print(f"{path}: bit {bit} of byte {place} was not found by {door}")
        counts[door] += 1
        path.write_bytes(before)
        remove(out)
    show(f"{name}: {counts.total()} flips, found by {dict(counts)}")
