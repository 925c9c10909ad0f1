"""Stock GPTQ checkpoints of AutoGPTQ and GPTQModel: read as bases, written as exports."""

from ...checkpoint.format import Format
from ...files.names import QUANTIZE_CONFIG_FILE

FORMAT = Format(name="gptq", package=__name__, quant_methods=("gptq",), marker=QUANTIZE_CONFIG_FILE)
