"""Loaded before any test imports Triton, which reads its interpreter switch when it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
