"""Checkpoints on disk: read them (ours and stock GPTQ), check them, write them, load them.

reader, safetensors_header   tensors of a directory, one by one
writer, atomic, manifest     shards written tensor by tensor, whole directories, hashes
layout, validate, base       our format; one view of a quantized base, whatever its format
stock_gptq, stock_writer     AutoGPTQ's and GPTQModel's format
quantizer, loading,          the transformers quantizer "qalora"
on_the_fly, routing, selection
"""
