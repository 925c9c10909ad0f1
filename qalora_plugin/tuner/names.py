"""Names of what an adapter learns: its parts, its matrices, and the modes that choose parts.

offsets' = offsets + scaling * (B A)^T              part "zeros"     A [r, G], B [N, r]
scales'  = scales * (1 + scaling * (B A)^T)         part "scales"    A [r, G], B [N, r]
"""

PREFIX = "qalora_"
"""Start of the name of everything that the tuner puts on a layer."""

SCALE_PREFIX = "qalora_scale_"
"""Part of the name of every parameter that changes scales, and of no other."""

MATRICES = {"zeros": ("qalora_A", "qalora_B"), "scales": ("qalora_scale_A", "qalora_scale_B")}
"""(A, B) of each part, as attributes of `QALoRALinear` and in an adapter's tensor names."""

ADAPT_PARTS = {"zeros": ("zeros",), "scales": ("scales",), "both": ("zeros", "scales")}
"""The parts that each value of `adapt` learns."""
