"""Small GGUF files, written by gguf-py, with blocks of random numbers."""

import gguf
import numpy as np

SIZES = {"width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ff": 96, "layers": 2}
ROWS_OF_NORM = {"attn_norm", "ffn_norm", "output_norm"}
_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}
_K_BYTES = {"Q4_K": (144, 0, 2), "Q5_K": (176, 0, 2), "Q6_K": (210, 208)}  # and where f16 lie
_MINIMUM = ("Q4_1", "Q5_1")
_SPECIAL = ["<|end|>", "<|user|>", "<tool>"]
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"


def random_blocks(kind, rows, blocks, seed=0):
    """Return blocks with scales of both signs and zeros, uint8 [rows, blocks * bytes]."""
    gen = np.random.default_rng(seed)
    raw = gen.integers(0, 256, (rows, blocks, _BYTES[kind]), dtype=np.uint8)
    d = gen.uniform(0.002, 0.02, (rows, blocks)) * gen.choice([-1, 1, 1], (rows, blocks))
    d[gen.random((rows, blocks)) < 0.1] = 0
    numbers = [d]
    if kind in _MINIMUM:
        minima = -d * gen.uniform(1, 31, (rows, blocks))
        numbers.append(np.where(d == 0, gen.normal(0, 0.1, (rows, blocks)), minima))
    for at, values in enumerate(numbers):
        raw[:, :, 2 * at : 2 * at + 2] = values.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def random_k_blocks(kind, rows, blocks, seed=0):
    """Return K-quant blocks of 256 inputs with sound f16 numbers, uint8 [rows, blocks * bytes]."""
    gen = np.random.default_rng(seed)
    size, *places = _K_BYTES[kind]
    raw = gen.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in places:
        numbers = gen.uniform(1e-4, 1e-3, (rows, blocks)) * gen.choice([-1, 1, 1], (rows, blocks))
        raw[:, :, at : at + 2] = numbers.astype(np.float16)[..., None].view(np.uint8)
    return raw.reshape(rows, -1)


def shapes(family="llama", tied=True, rows=None):
    """Return {tensor: shape} of a small model, as numpy has it."""
    s = SIZES
    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    rows = rows or len(tokens()[0])
    found = {"token_embd.weight": (rows, s["width"]), "output_norm.weight": (s["width"],)}
    for i in range(s["layers"]):
        parts = {
            "attn_norm": (s["width"],),
            "attn_q": (q, s["width"]),
            "attn_k": (kv, s["width"]),
            "attn_v": (kv, s["width"]),
            "attn_output": (s["width"], q),
            "ffn_norm": (s["width"],),
            "ffn_gate": (s["ff"], s["width"]),
            "ffn_up": (s["ff"], s["width"]),
            "ffn_down": (s["width"], s["ff"]),
        }
        if family == "qwen3":
            parts |= {"attn_q_norm": (s["head_dim"],), "attn_k_norm": (s["head_dim"],)}
        if family in ("gemma2", "gemma3"):
            parts |= {"post_attention_norm": (s["width"],), "post_ffw_norm": (s["width"],)}
        if family == "gemma3":
            parts |= {"attn_q_norm": (s["head_dim"],), "attn_k_norm": (s["head_dim"],)}
        found |= {f"blk.{i}.{part}.weight": shape for part, shape in parts.items()}
        if family == "qwen2":
            biases = {"attn_q": q, "attn_k": kv, "attn_v": kv}
            found |= {f"blk.{i}.{part}.bias": (n,) for part, n in biases.items()}
    return found if tied else found | {"output.weight": found["token_embd.weight"]}


def tokens():
    """Return tokens and merges of a byte-level BPE with three special tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = ["t h", "th e", "Ġ the", "a n", "an d", "Ġ and", "1 2", "12 3"]
    return [*_SPECIAL, *letters, *("".join(m.split(" ")) for m in merges)], merges


def sentencepiece():
    """Return tokens, scores and types of a vocabulary that was SentencePiece's."""
    letters = [chr(c) for c in range(33, 127)]
    words = ["▁t", "th", "▁th", "he", "▁the", "▁a", "nd", "▁and", "▁"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [-1e3 - i for i in range(94)]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)]
    return pieces, scores, types


def write_gguf(path, kinds=None, kind="Q4_1", family="llama", tied=True, **more):
    """Write a model whose matrices are of `kind`, those that `kinds` names by their last parts of
    others; `more` are key-values, and None leaves one out."""
    writer = gguf.GGUFWriter(path, family)
    for seed, (name, shape) in enumerate(write_header(writer, family, tied, **more).items()):
        part = name.split(".")[-2]
        chosen = (kinds or {}).get(part, "Q8_0" if part in ("token_embd", "output") else kind)
        gen = np.random.default_rng(seed)
        if len(shape) == 1:
            writer.add_tensor(name, (1 + gen.normal(0, 0.1, shape)).astype(np.float32))
        elif chosen in _BYTES:
            raw = random_blocks(chosen, shape[0], shape[1] // 32, seed)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[chosen])
        elif chosen in _K_BYTES:
            raw = random_k_blocks(chosen, shape[0], shape[1] // 256, seed)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType[chosen])
        elif chosen == "F16":
            writer.add_tensor(name, gen.normal(0, 0.1, shape).astype(np.float16))
        else:
            values = gen.normal(0, 0.1, shape).astype(np.float32)
            stored = gguf.GGMLQuantizationType[chosen]
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_header(writer, family="llama", tied=True, **more):
    """Write the key-values, and return the `shapes` of the tensors that go with them."""
    _write_fields(writer, family, more)
    return shapes(family, tied, len(more.get("tokenizer.ggml.tokens", ())) or None)


def _write_fields(writer, family, more):
    s = SIZES
    names, merges = tokens()
    values = {
        "general.name": "A small model",
        "general.license": "apache-2.0",
        "general.languages": ["en", "de"],
        f"{family}.context_length": 128,
        f"{family}.embedding_length": s["width"],
        f"{family}.block_count": s["layers"],
        f"{family}.feed_forward_length": s["ff"],
        f"{family}.attention.head_count": s["heads"],
        f"{family}.attention.head_count_kv": s["kv_heads"],
        f"{family}.attention.key_length": s["head_dim"],
        f"{family}.attention.value_length": s["head_dim"],
        f"{family}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{family}.rope.freq_base": 50000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [3, 3, 4, *[1] * (len(names) - 3)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
        **({"gemma3.attention.sliding_window": 16} if family == "gemma3" else {}),
        **more,
    }
    for key, value in values.items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
