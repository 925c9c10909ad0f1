"""Charts as inline SVG, by pygal; None where it is not installed (the extra `report`)."""

import math
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

Points = Sequence[tuple[float, float]]
# comments have addresses, and scripts are for tooltips from the network
_UNWANTED = re.compile(r"<!--.*?-->|<script.*?</script>", re.DOTALL)


def lines(name: str, series: Mapping[str, Points], x: str, y: str) -> str | None:
    """Return curves as SVG; `name` is the id of the element, `x` and `y` title the axes."""
    if not has_charts():
        return None
    import pygal

    chart = pygal.XY(x_title=x, y_title=y, dots_size=2, **_options())
    for title, points in series.items():
        # a loss may be NaN
        chart.add(title, [point for point in points if math.isfinite(point[1])])
    return _svg(chart, name)


def bars(name: str, values: Mapping[str, float], y: str) -> str | None:
    """Return one horizontal bar a value as SVG; `y` says what they are."""
    if not has_charts():
        return None
    import pygal

    chart = pygal.HorizontalBar(x_title=y, print_values=True, **_options() | {"show_legend": False})
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    chart.x_labels = list(values)[::-1]  # pygal draws from the bottom
    chart.add("", list(values.values())[::-1])
    return _svg(chart, name)


def has_charts() -> bool:
    """Return whether pygal is installed."""
    return find_spec("pygal") is not None


def _options() -> dict[str, Any]:
    """Return options with which colours are those of the page, light or dark."""
    from pygal.style import Style

    style = Style(
        background="transparent",
        plot_background="transparent",
        foreground="var(--text)",
        foreground_strong="var(--text)",
        foreground_subtle="var(--dim)",
        colors=("var(--first)", "var(--second)"),
        value_colors=("var(--text)", "var(--text)"),
        font_family="inherit",
        label_font_size=14,
        major_label_font_size=14,
        title_font_size=14,
        legend_font_size=14,
        value_font_size=14,
    )
    return {
        "style": style,
        "js": [],
        "width": 480,  # scaled to a phone's 330 pixels, and to 576 at most: both can be read
        "height": 280,
        "disable_xml_declaration": True,
        "legend_at_bottom": True,
        "max_scale": 6,
        "value_formatter": lambda value: f"{value:.4g}",
    }


def _svg(chart: Any, name: str) -> str:
    chart.uuid = name
    return _UNWANTED.sub("", chart.render(is_unicode=True))
