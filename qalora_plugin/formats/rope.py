"""Rotary embeddings in config.json: as transformers 5 writes them, and as older readers do."""

from typing import Any


def with_legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json, or its text_config, with the keys of transformers 4 beside those of 5.

    Readers that know `rope_theta` and `rope_scaling` only would fall back to a theta of 10000
    without a word. `rope_parameters` may have one entry for every layer type (Gemma 3); its sliding
    layers' theta was `rope_local_base_freq`.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    legacy: dict[str, Any] = {}
    if "full_attention" in rope:
        if "sliding_attention" in rope:
            legacy["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            legacy[key] = rope[key]
    if rope.get("rope_type", "default") != "default":
        legacy["rope_scaling"] = {key: rope[key] for key in rope if key != "rope_theta"}
    return {**config, **legacy}
