"""The figures of the page on losses, as HTML: drawn here, moved by `_static/lessons.js`."""

from __future__ import annotations

import json
from collections.abc import Iterator

from lessons.curves import LABEL, MOVED, OUTPUTS, STEPS, Point, point, slices
from lessons.drawing import Panel, number, svg, text, ticks

WIDTH = 480
BESIDE = {
    **dict.fromkeys(("smooth_l1", "squared_hinge"), "mse"),
    **dict.fromkeys(("l1_softmax", "mse_softmax", "bce", "label_smoothing"), "cross_entropy"),
    **dict.fromkeys(("focal", "squentropy", "poly1", "gce", "multi_margin"), "cross_entropy"),
}
"""The loss whose value a figure shows beside its own, dashed."""

HAS_TARGETS = {"l1", "mse", "smooth_l1"}
"""The losses that are least where the outputs are the targets."""

ROW_HEIGHT = 34


def loss_figure(name: str) -> str:
    """Return the figure of a loss: its value and gradient along one output, and all three pulls."""
    along = slices(name)
    beside = BESIDE.get(name, "")
    y_ticks = ticks(*_range(along))
    y = (y_ticks[0], y_ticks[-1])
    panel = Panel(left=70, top=10, width=WIDTH - 90, height=220, x=(-4, 4), y=y)
    start = point(name)
    parts = [
        *panel.axes(range(-4, 5), y_ticks),
        *_curves(panel, along, beside),
        *_markers(panel, start),
        *_pulls(panel, name, start),
    ]
    label = f"Value and gradient of {name} along one of three outputs"
    drawing = svg(WIDTH, panel.top + panel.height + 40 + 3 * ROW_HEIGHT, label, parts)
    legend = ['<span class="key value">value</span>', '<span class="key gradient">gradient</span>']
    if beside:
        legend.append(f'<span class="key beside">value of <code>{beside}</code></span>')
    return f"""<figure class="lesson loss" data-loss="{name}">
<div class="drawing"><div class="legend">{" ".join(legend)}</div>
{drawing}</div>
<div class="reading">{_controls(name)}{_table(start)}</div>
<script type="application/json">{_data(panel, along)}</script>
</figure>"""


def _range(along: dict[str, list[Point]]) -> tuple[float, float]:
    """Return the lowest and the highest number of all curves."""
    numbers = [each.value for points in along.values() for each in points]
    numbers += [each.gradient[MOVED[key]] for key, points in along.items() for each in points]
    return min(0.0, *numbers), max(numbers)


def _curves(panel: Panel, along: dict[str, list[Point]], beside: str) -> Iterator[str]:
    """Yield the curves, a group for each output that can be moved; one is hidden by the style."""
    for key, points in along.items():
        yield f'<g class="along {key}">'
        if beside:
            yield panel.curve(STEPS, [each.value for each in slices(beside)[key]], "beside")
        slopes = [each.gradient[MOVED[key]] for each in points]
        jump = (max(slopes) - min(slopes)) / 5
        yield panel.curve(STEPS, slopes, "gradient", jump=jump)
        yield panel.curve(STEPS, [each.value for each in points], "value")
        yield "</g>"


def _markers(panel: Panel, start: Point) -> Iterator[str]:
    x, slope = OUTPUTS[LABEL], start.gradient[LABEL]
    yield panel.line((x, panel.y[0]), (x, panel.y[1]), "at")
    yield panel.dot(x, slope, "at-gradient")
    yield panel.dot(x, start.value, "at-value")


def _pulls(panel: Panel, name: str, start: Point) -> Iterator[str]:
    """Yield a line a class: a dot at its output, and an arrow along its pull."""
    top = panel.top + panel.height + 40
    for k, (output, slope) in enumerate(zip(start.outputs, start.gradient, strict=True)):
        y = top + k * ROW_HEIGHT + ROW_HEIGHT / 2
        x = panel.across(output)
        css = "right" if k == LABEL else "wrong"
        yield f'<g class="pull {css}">'
        yield text(0, y + 5, f"class {k}")
        ends = f'x1="{panel.left}" x2="{panel.left + panel.width}"'
        yield f'<line {ends} y1="{y}" y2="{y}" class="grid"/>'
        if name in HAS_TARGETS:
            target = panel.across(float(k == LABEL))
            yield f'<line x1="{target}" x2="{target}" y1="{y - 9}" y2="{y + 9}" class="target"/>'
        end = panel.across(output - slope)
        yield f'<path d="{arrow(x, end, y)}" class="arrow"/>'
        yield f'<circle cx="{x}" cy="{y}" r="5"/></g>'


def arrow(start: float, end: float, y: float) -> str:
    """Return the path of a horizontal arrow. `lessons.js` has the same."""
    head = max(-7.0, min(7.0, start - end))
    return f"M{start:g} {y:g}H{end:g}m{head:g} -5L{end:g} {y:g}l{head:g} 5"


def _controls(name: str) -> str:
    """Return the slider and the choice of the output that it moves; shown by `lessons.js`."""
    choices = "".join(
        f'<label><input type="radio" name="moved-{name}" value="{key}"'
        f"{' checked' if key == 'right' else ''}> class {moved}, {key}</label>"
        for key, moved in MOVED.items()
    )
    places = f'min="0" max="{len(STEPS) - 1}" value="{STEPS.index(OUTPUTS[LABEL])}"'
    return f"""<div class="controls" hidden>
<div>Move the output of</div>
<div>{choices}</div>
<input type="range" {places} aria-label="output">
</div>"""


def _table(start: Point) -> str:
    rows = "".join(
        f"<tr{' class=right' if k == LABEL else ''}><td>{k}</td><td>{number(start.outputs[k])}</td>"
        f"<td>{int(k == LABEL)}</td><td>{number(start.probabilities[k])}</td>"
        f"<td>{number(start.gradient[k])}</td></tr>"
        for k in range(len(OUTPUTS))
    )
    heads = ("class", "output", "target", "probability", "gradient")
    head = "".join(f"<th>{name}</th>" for name in heads)
    value = f'<p>loss: <output class="value">{number(start.value)}</output></p>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{value}"


def _data(panel: Panel, along: dict[str, list[Point]]) -> str:
    """Return what `lessons.js` needs: the panel, and all numbers of each step."""
    rows = {
        key: [
            [round(each, 4) for each in (point.value, *point.gradient, *point.probabilities)]
            for point in points
        ]
        for key, points in along.items()
    }
    data = {
        "panel": [panel.left, panel.top, panel.width, panel.height, *panel.x, *panel.y],
        "outputs": OUTPUTS,
        "moved": MOVED,
        "steps": STEPS,
        "points": rows,
    }
    return json.dumps(data, separators=(",", ":"))
