"""The transformers quantizer "qalora": load quantized models, and quantize while loading."""
