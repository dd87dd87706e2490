"""The figures and the table that show three or all losses side by side, as HTML and Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator

from cnn.losses import LOSSES
from lessons.curves import LABEL, SHARES, Curve, alike, descent, point
from lessons.drawing import Panel, number, svg, ticks

TAUGHT = ("l1", "mse", "cross_entropy")
WIDTH, HEIGHT = 300, 230
SHARE = 0.4
LEARNING_RATE, STEPS = 0.5, 20
HIGHEST = 2.5
"""Where the curves of images that look alike are cut off."""


def example_table() -> Iterator[str]:
    """Yield a table of all losses at the worked example, in Markdown."""
    yield "| Loss | Value | Gradient of output 0 | of output 1 | of output 2 |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for name in LOSSES:
        at = point(name)
        cells = [f"`{name}`", *(number(each) for each in (at.value, *at.gradient))]
        yield f"| {' | '.join(cells)} |"


def alike_figure() -> str:
    """Return the mean loss of images that look alike, by the answer, for the losses taught."""
    drawings, data = [], {}
    for name in TAUGHT:
        curves = [alike(name, share) for share in SHARES]
        y_ticks = ticks(0, min(HIGHEST, max(max(curve.means) for curve in curves)), 4)
        x = (0.0, 1.0) if name == "cross_entropy" else (-0.2, 1.2)
        panel = _panel(x, (0, y_ticks[-1]))
        states = [_state(panel, curve) for curve in curves]
        now = states[SHARES.index(SHARE)]
        parts = [
            *panel.axes([0, 0.25, 0.5, 0.75, 1], y_ticks),
            f'<path d="{now["curve"]}" class="curve value"/>',
            f'<path d="{now["best"]}" class="best"/>',
        ]
        label = f"Mean {name} of images that look alike, by the answer"
        drawings.append(
            f'<div data-loss="{name}"><div class="title"><code>{name}</code>: '
            f"best <output>{now['text']}</output></div>{svg(WIDTH, HEIGHT, label, parts)}</div>"
        )
        data[name] = states
    chosen = SHARES.index(SHARE)
    return f"""<figure class="lesson alike">
<div class="controls" hidden>
<label>Share of class 0: <output>{SHARE * 100:g} %</output>
<input type="range" min="0" max="{len(SHARES) - 1}" value="{chosen}"></label>
</div>
<div class="panels">{"".join(drawings)}</div>
<script type="application/json">{json.dumps(data, separators=(",", ":"))}</script>
<figcaption>Mean loss of 20 images that look alike. Across: output 0, and for
<code>cross_entropy</code> the probability of class 0. The mark shows the best answer.</figcaption>
</figure>"""


def _panel(x: tuple[float, float], y: tuple[float, float]) -> Panel:
    return Panel(left=46, top=12, width=WIDTH - 60, height=HEIGHT - 40, x=x, y=y)


def _state(panel: Panel, curve: Curve) -> dict[str, str]:
    """Return how a panel looks for a share: its curve, its mark, and the best answer."""
    points = [
        panel.at(answer, mean)
        for answer, mean in zip(curve.answers, curve.means, strict=True)
        if mean <= panel.y[1]
    ]
    low, high = curve.best
    start = panel.at(low, min(curve.means))
    return {
        "curve": f"M{'L'.join(points)}",
        "best": f"M{start}H{panel.across(high) + 0.1:g}",
        "text": number(low) if high == low else f"{number(low)} to {number(high)}",
    }


def descent_figure() -> str:
    """Return the three outputs of the example under gradient steps, for the losses taught."""
    drawings = []
    for name in TAUGHT:
        points = descent(name, learning_rate=LEARNING_RATE, steps=STEPS)
        panel = _panel((0, STEPS), (-1, 3))
        parts = [*panel.axes(range(0, STEPS + 1, 5), range(-1, 4))]
        for k in range(len(points[0].outputs)):
            css = "value" if k == LABEL else "gradient"
            outputs = [each.outputs[k] for each in points]
            parts.append(panel.curve(range(STEPS + 1), outputs, css))
        label = f"The outputs of the example under {STEPS} gradient steps of {name}"
        drawings.append(
            f'<div><div class="title"><code>{name}</code></div>'
            f"{svg(WIDTH, HEIGHT, label, parts)}</div>"
        )
    return f"""<figure class="lesson">
<div class="legend"><span class="key value">class 1, right</span>
<span class="key gradient">classes 0 and 2, wrong</span></div>
<div class="panels">{"".join(drawings)}</div>
<figcaption>The three outputs during {STEPS} steps with learning rate {LEARNING_RATE}, if they
themselves were the weights.</figcaption>
</figure>"""
