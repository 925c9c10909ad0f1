"""AutoAWQ checkpoints (version gemm): read as bases, and merged scales written back."""

from ...checkpoint.format import Format, Grids, Runtime

FORMAT = Format(
    name="awq",
    package=__name__,
    grids=Grids(bits=(4,), integer_zeros=True, holder="AWQ"),
    runs_in="AutoAWQ",
    runtime=Runtime("AutoAWQ", (("awq",),), "autoawq"),
    hub_library="transformers",
    usage="`{repo_id}` is used as the model that it was made from.",
    quant_methods=("awq",),
    is_base=True,
    is_export=False,
    owners=("gptqmodel",),
    takes_back=("scales",),
    back_note="its zero-points are integers",
)
