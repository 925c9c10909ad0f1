"""The names of files in a model, adapter or export directory."""

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
QUANTIZE_CONFIG_FILE = "quantize_config.json"
"""AutoGPTQ's config, beside config.json or instead of its `quantization_config`."""

MANIFEST_FILE = "qalora_manifest.json"
REPORT_FILE = "quantization_report.json"
RECORD_FILE = "qalora_export.json"
