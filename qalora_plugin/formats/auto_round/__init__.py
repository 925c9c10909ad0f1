"""AutoRound checkpoints: read as bases, and merged scales written back."""

from ...checkpoint.format import Format, Grids, Runtime

FORMAT = Format(
    name="auto-round",
    package=__name__,
    grids=Grids(integer_zeros=True, holder="AutoRound"),
    runs_in="auto-round",
    runtime=Runtime("auto-round", (("auto_round",),), "auto-round"),
    hub_library="transformers",
    usage="`{repo_id}` is used as the model that it was made from.",
    quant_methods=("auto-round", "intel/auto-round"),
    is_base=True,
    is_export=False,
    owners=("auto_round",),
    takes_back=("scales",),
    back_note="its zero-points are integers",
)
