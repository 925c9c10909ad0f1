"""Merge an adapter into its quantized base, on files alone."""
