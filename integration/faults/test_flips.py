"""One flipped bit in any file of a directory is found by whoever reads it.

A flip for every file by default; `make faults` makes 200 for each directory.
"""

import json
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
from qalora_plugin.files.binding import numbers_in
from qalora_plugin.files.names import ADAPTER_CONFIG_FILE, CONFIG_FILE
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


def _may_be_edited(path, before, after):
    """Say whether a config says the same of numbers: docs/checks.md lets users edit the rest."""
    if path.name not in (CONFIG_FILE, ADAPTER_CONFIG_FILE):
        return False
    try:
        old, new = (numbers_in(json.loads(content), path.name) for content in (before, after))
    except ValueError:
        return False
    return old == new


def _errors(path, door):
    """Return what a door may raise: loading reads configs in transformers and PEFT first."""
    if door == "load" and path.name in (CONFIG_FILE, ADAPTER_CONFIG_FILE):
        return QALoRAError, OSError, ValueError
    return QALoRAError


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
        if _may_be_edited(path, before, after):
            counts["may be edited"] += 1
            continue
        path.write_bytes(after)
        with pytest.raises(_errors(path, door)):
            doors[door]()
            print(f"{path}: bit {bit} of byte {place} was not found by {door}")
        counts[door] += 1
        path.write_bytes(before)
        remove(out)
    harmless = counts.pop("may be edited", 0)
    show(
        f"{name}: {counts.total()} flips, found by {dict(counts)}; {harmless} in what may be edited"
    )
