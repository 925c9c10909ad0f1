"""Benchmarks of a model by lm-evaluation-harness: merged, an adapter beside its base, or 16-bit."""
