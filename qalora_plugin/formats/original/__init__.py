"""The format that a merged model's base came in: its file again, with the adapter in it."""

from ...checkpoint.format import Format, Grids, Option, Runtime

FORMAT = Format(
    name="original",
    package=__name__,
    grids=Grids(act_order=True),
    runs_in="what ran the file that was the base: a copy of it, scales and offsets patched",
    runtime=Runtime("that of the base's own format", (), ""),
    hub_library="transformers",
    usage="`{repo_id}` is used as the model that it was made from.",
    of_source=True,
    holds_experts=True,
    options=(
        Option(
            "original",
            "the file or directory that the base was read from (default: where it was read)",
            metavar="PATH",
        ),
    ),
)
