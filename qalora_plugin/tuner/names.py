"""The names of an adapter's matrices, (A, B) of each part: the modules of a layer, and its keys."""

MATRICES = {"zeros": ("qalora_A", "qalora_B"), "scales": ("qalora_scale_A", "qalora_scale_B")}
