"""The quickstart: a small language model, or an embedded toy, and pairs that every machine has."""
