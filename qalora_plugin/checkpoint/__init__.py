"""Our checkpoint format: config, layout, validation, and one view of any quantized model."""
