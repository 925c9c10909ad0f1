"""Damage the bytes of files that others may have written: JSON, headers, front matter.

`mutated(content, name, draw)` returns the same for the same generator, so a case is its seed.
"""

import copy
import json
import struct

HOSTILE = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 33, 255, 2**31 - 1, 2**31, 2**40, 2**63, -(2**63)),
    *(10**30, 0.5, 1e308, -0.0, float("nan"), float("inf"), "", "x", "4", "../x", "/etc/hostname"),
    *("\x1b[2J", "a" * 5000, "(a+)+$", "*" * 40, "%s{0}", "\u202e", "ä字\U0001f600", "float16"),
    *([], {}, [[]], [None], [0], [-1], ["x"], [2**40], [1, 2, 3], {"": {}}, {"a": None}, [{}]),
    *("llama", "gptq", "awq", "gguf", "LlamaForCausalLM", "model.layers.0", ["lm_head"]),
]
TEXTS = [  # what no serializer writes
    *('"\\ud800"', '{"\\udfff": 1}', "1" * 500, "1" * 5000, "-", "NaN", "1e999", "'x'", "01", "{"),
    *("[" * 2000 + "]" * 2000, '{"a":' * 60 + "1" + "}" * 60, '{"a": 1, "a": 2}', "\x00", "\ufeff"),
]
_NUMBERS = (0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_LENGTH = 8  # bytes before the header of a safetensors file
_GGUF_HEADER = 20_000  # bytes at most of what is damaged; the rest are weights


def mutated(content, name, draw):
    """Damage the content of a file.

    Args:
        content: its bytes.
        name: of the file, whose ending says what it holds.
        draw: the random generator.

    Returns:
        Other bytes.
    """
    kinds = {".json": _json, ".safetensors": _safetensors, ".gguf": _gguf, ".md": _front_matter}
    change = kinds.get(name[name.rfind(".") :], _bytes)
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        content = change(content, draw)
    return content


def _json(content, draw):
    """Change a value, or the text."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # an earlier change
        return _bytes(content, draw)
    if draw.random() < 0.25:
        return _bytes(content, draw)
    if draw.random() < 0.2:  # what stands for a value here is replaced in the text
        text = json.dumps(_changed(value, draw, lambda old: "\x01mark"))
        return text.replace('"\\u0001mark"', draw.choice(TEXTS)).encode("utf-8", "surrogatepass")
    return json.dumps(_changed(value, draw)).encode()


def _places(value):
    """Yield (container, key) of everything in a JSON value."""
    stack = [value]
    while stack:
        found = stack.pop()
        keys = found if isinstance(found, dict) else range(len(found))
        for key in keys:
            yield found, key
            if isinstance(found[key], dict | list):
                stack.append(found[key])


def _changed(value, draw, new=None):
    """Return a JSON value with one place changed; `new` gives the value there."""
    places = list(_places(value)) if isinstance(value, dict | list) else []
    if not places:
        return draw.choice(HOSTILE)
    if draw.random() < 0.7:  # keys of the file itself are few among those of its tensors
        tops = [place for place in places if place[0] is value]
        inner = [p for p in places if p[0] is not value][:200]
        places = draw.choice([tops, inner or tops])
    container, key = draw.choice(places)
    old = container[key]
    how = draw.choice(["replace", "replace", "number", "delete", "move", "copy", "wrap"])
    if new is not None:
        container[key] = new(old)
    elif how == "number" and isinstance(old, int | float):
        container[key] = draw.choice([old + 1, old - 1, old * 2, -old, old * 10**9, str(old)])
    elif how == "delete":
        del container[key]
    elif how == "move":
        other, place = draw.choice(places)
        container[key] = copy.deepcopy(other[place])  # which may hold the container
    elif how == "copy" and isinstance(container, dict):
        container[f"{key}x"] = old
    elif how == "wrap":
        container[key] = draw.choice([[old], {"x": old}, [old, old], str(old)])
    else:
        container[key] = copy.deepcopy(draw.choice(HOSTILE))
    return value


def _bytes(content, draw):
    """Flip, insert, remove or repeat some bytes."""
    data = bytearray(content)
    at = draw.randrange(len(data) + 1)
    size = draw.choice([1, 1, 2, 8, 100])
    how = draw.choice(["flip", "flip", "insert", "remove", "repeat", "cut", "number"])
    if how == "flip" and data:
        data[at - 1] ^= 1 << draw.randrange(8)
    elif how == "insert":
        data[at:at] = draw.randbytes(size)
    elif how == "remove":
        del data[at : at + size]
    elif how == "repeat":
        data[at:at] = data[at : at + size] * draw.choice([1, 3])
    elif how == "cut":
        del data[at:]
    else:
        width = draw.choice("IQ")
        number = struct.pack(f"<{width}", draw.choice(_NUMBERS) % (1 << 8 * struct.calcsize(width)))
        data[at : at + len(number)] = number
    return bytes(data)


def _safetensors(content, draw):
    """Change a safetensors file's header, whose length may be right, or its end."""
    length = int.from_bytes(content[:_LENGTH], "little")
    header, data = content[_LENGTH : _LENGTH + length], content[_LENGTH + length :]
    how = draw.random()
    if how < 0.1:
        return content[: draw.randrange(len(content) + 1)]
    if how < 0.2:
        return _bytes(content[: _LENGTH + length], draw) + data
    if how < 0.3:
        return draw.choice(_NUMBERS).to_bytes(_LENGTH, "little") + header + data
    if how < 0.4:
        data = _bytes(data, draw)
    header = _json(header, draw)
    return len(header).to_bytes(_LENGTH, "little") + header + data


def _gguf(content, draw):
    """Change bytes of a GGUF file's key-values and list of tensors, or cut it."""
    if draw.random() < 0.1:
        return content[: draw.randrange(len(content) + 1)]
    return _bytes(content[:_GGUF_HEADER], draw) + content[_GGUF_HEADER:]


def _front_matter(content, draw):
    """Change the YAML at the start of a README."""
    hostile = [
        "license: !!python/object:os.system x",
        "license: [a",
        "a: &a [*a]",
        "license: {x: 1}",
    ]
    hostile += ["license: 10e400", "x: &x [1,1]\ny: &y [*x,*x]\nlicense: *y", "license: \x1b[2J"]
    if draw.random() < 0.5:
        return f"---\n{draw.choice(hostile)}\n---\n".encode()
    return _bytes(content, draw)
