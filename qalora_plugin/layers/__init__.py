"""The quantized linear layer as a torch module."""
