"""Quantize a 16-bit model to n bits, with calibration (GPTQ) or without."""
