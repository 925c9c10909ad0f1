"""Quantize a model block by block: one decoder block in memory at a time, resumable after a kill."""

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from qalora_kernels import SUPPORTED_BITS, QuantSpec
from torch import nn
from tqdm import tqdm

from ..checkpoint.atomic import AtomicDirectory
from ..checkpoint.reader import CONFIG_FILE, CheckpointReader, resolve_model_dir
from ..checkpoint.selection import linears_to_quantize
from ..checkpoint.side_files import copy_side_files
from ..checkpoint.writer import CheckpointWriter, ShardWriter, split_plan
from ..errors import ConfigError
from .blocks import Call, call_block, find_blocks, find_stages, record, watch_inputs
from .calibration import Calibration, calibration_windows
from .config import METHODS, QALoRAQuantConfig
from .gptq import GPTQSettings, Hessian, gptq
from .grid import QuantizedWeight
from .resume import REPORT_FILE, resume_tag, warn_of_leftovers
from .rtn import rtn
from .source import ModelSource
