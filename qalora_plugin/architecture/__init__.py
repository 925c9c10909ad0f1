"""What transformers knows of a model: its empty modules, their names, and which are quantized."""
