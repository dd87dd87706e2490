"""The pages that teach: what they say and show is what `cnn.losses` and the network compute."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from test_losses import ORACLES
from torch import nn

from benchmarks.pages import chromium
from cnn import losses as constants
from cnn.losses import LOSSES, sigmoid_normalised, softmax
from cnn.networks import CNN
from lessons.curves import LABEL, MOVED, OUTPUTS, SHARES, STEPS, alike, point
from lessons.difference_figures import TAUGHT, alike_figure, example_table
from lessons.loss_figures import loss_figure
from lessons.network import layers
from lessons.network_figures import layers_table, three_images

DOCS = Path(__file__).parent.parent / "docs"
LOSSES_PAGE = (DOCS / "explanation" / "losses.md").read_text()
NETWORK_PAGE = (DOCS / "explanation" / "network.md").read_text()

every_loss = pytest.mark.parametrize("name", LOSSES)


def section(name: str) -> str:
    """Return what the page says under the heading of a loss."""
    (found,) = re.findall(
        rf"^##+ `{name}`.*?\n(.*?)(?=^##+ |\Z)", LOSSES_PAGE, re.MULTILINE | re.DOTALL
    )
    return found


@every_loss
def test_a_loss_has_a_section_with_formula_figure_and_paper(name: str) -> None:
    text = section(name)
    assert "$$" in text
    assert f"```{{lesson}} loss {name}\n" in text
    cited = re.match(r".*?\d{4}|[^,]+", LOSSES[name].source)
    assert cited
    for word in re.findall(r"[A-Z][\w.]+|\d{4}|torch\S+", cited.group()):
        assert word in text.split("```{lesson}")[1], word


@pytest.mark.parametrize("name", TAUGHT)
def test_a_loss_that_is_taught_has_code_and_a_result(name: str) -> None:
    assert "```python\n" in section(name)
    assert re.search(r"<!-- result -->\n.*?\(\.\./benchmarks/cifar10\.md\)", section(name), re.S)


@pytest.mark.parametrize("page", [LOSSES_PAGE, NETWORK_PAGE], ids=["losses", "network"])
def test_the_code_of_a_page_prints_what_its_comments_say(page: str) -> None:
    names: dict[str, object] = {}
    printed = io.StringIO()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    with contextlib.redirect_stdout(printed):
        for block in blocks:
            exec(block, names)
    said = re.findall(r"^print\(.*\)  # (.*)$", "".join(blocks), re.MULTILINE)
    assert said
    assert printed.getvalue().splitlines() == said


def drawn(name: str) -> dict[str, list[tuple[list[float], list[float]]]]:
    """Return the outputs of each step of a figure, and the numbers that it shows of them."""
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', loss_figure(name))
    points = json.loads(data)["points"]
    return {
        key: [
            ([*OUTPUTS[:moved], step, *OUTPUTS[moved + 1 :]], numbers)
            for step, numbers in zip(STEPS, points[key], strict=True)
        ]
        for key, moved in MOVED.items()
    }


def slopes(name: str, row: list[float], k: int) -> tuple[float, float]:
    """Return how steep the slow version of a loss is, before and after an output."""
    h = 1e-6
    at, before, after = (
        ORACLES[name]([*row[:k], row[k] + step, *row[k + 1 :]], LABEL) for step in (0, -h, h)
    )
    return (at - before) / h, (after - at) / h


@every_loss
def test_a_figure_shows_values_and_gradients_of_its_loss(name: str) -> None:
    for steps in drawn(name).values():
        for row, (value, *gradient) in steps[::8]:
            assert value == pytest.approx(ORACLES[name](row, LABEL), abs=1e-4)
            for k in range(len(row)):
                low, high = sorted(slopes(name, row, k))  # they differ at a kink
                assert low - 1e-3 <= gradient[k] <= high + 1e-3


def test_a_figure_shows_the_probabilities_that_a_model_reports() -> None:
    row, numbers = drawn("bce")["right"][0]
    expected = sigmoid_normalised(torch.tensor([row]))[0].tolist()
    assert numbers[4:] == pytest.approx(expected, abs=1e-4)


def test_a_figure_starts_at_the_worked_example() -> None:
    assert '<output class="value">1.1019</output>' in loss_figure("cross_entropy")


def test_the_worked_example_is_said_as_it_is_computed() -> None:
    rows = {row.split("`")[1]: row for row in example_table() if "`" in row}
    assert list(rows) == list(LOSSES)
    for name, said in {"l1": "= 0.4.", "mse": "= 0.2467.", "cross_entropy": "**1.1019**"}.items():
        assert said in section(name)
        value = said.strip("=* .")
        assert f"{point(name).value:.4f}".rstrip("0") == value
        assert f"| {value} |" in rows[name]
    assert f"ln 3 = {math.log(3):.4f}" in section("cross_entropy")
    assert point("label_smoothing").value == pytest.approx(point("cross_entropy").value)


ROWS = [OUTPUTS, (2.0, -1.5, 0.4), (-3.0, 3.0, 0.7), (4.0, -4.0, 1.3)]


@pytest.mark.parametrize("row", ROWS)
def test_the_gradients_are_those_of_the_formulas(row: tuple[float, ...]) -> None:
    outputs = torch.tensor([row], dtype=torch.float64)
    target = torch.eye(3, dtype=torch.float64)[LABEL]
    p = softmax(outputs)[0]
    p_y, error, cross_entropy = p[LABEL], outputs[0] - target, p - target
    said = {
        "l1": error.sign() / 3,
        "mse": 2 * error / 3,
        "cross_entropy": cross_entropy,
        "smooth_l1": error.clamp(-1, 1) / 3,
        "bce": (outputs[0].sigmoid() - target) / 3,
        "label_smoothing": p - (0.9 * target + 0.1 / 3),
        "l1_softmax": p_y * cross_entropy,
        "poly1": (1 + 2 * p_y) * cross_entropy,
        "gce": p_y**0.7 * cross_entropy,
    }
    for name, expected in said.items():
        assert point(name, row).gradient == pytest.approx(expected.tolist()), name


def test_the_constants_of_the_page_are_those_of_the_losses() -> None:
    said = {
        "label_smoothing": (r"\\varepsilon = (\S+)", constants.LABEL_SMOOTHING),
        "focal": (r"\\gamma = (\S+)", constants.FOCAL_GAMMA),
        "poly1": (r"\\varepsilon = (\S+)", constants.POLY1_EPSILON),
        "gce": (r"q = (\S+)\n", constants.GCE_Q),
    }
    for name, (pattern, constant) in said.items():
        assert [float(each) for each in re.findall(pattern, section(name))] == [constant]
    best = 1 - constants.LABEL_SMOOTHING * 2 / 3
    assert f"{best:.4f}" in section("label_smoothing")


@pytest.mark.parametrize("share", SHARES)
def test_the_best_answer_is_a_median_or_the_share(share: float) -> None:
    median = (0.0, 1.0) if share == 0.5 else (float(share > 0.5),) * 2
    assert alike("l1", share).best == median
    for name in ("mse", "cross_entropy"):
        assert alike(name, share).best == pytest.approx((share, share))


def test_all_zeros_suits_l1_where_no_class_has_half() -> None:
    labels = torch.arange(10)  # images of ten classes that look alike
    zeros = LOSSES["l1"](torch.zeros(10, 10), labels).item()
    assert zeros == pytest.approx(0.1)
    others = torch.randn(50, 1, 10, generator=torch.Generator().manual_seed(0))
    for outputs in others * 0.1:
        assert LOSSES["l1"](outputs.expand(10, -1), labels).item() > zeros


def test_the_layers_are_those_of_the_network() -> None:
    found = layers()
    assert sum(layer.parameters for layer in found) == sum(p.numel() for p in CNN(10).parameters())
    products = {  # outputs × inputs of each
        "convolution, 32": [32 * 32 * 32 * 3 * 25, 32 * 16 * 16 * 32 * 25],
        "convolution, 64": [64 * 8 * 8 * 32 * 25],
        "linear": [1024 * 64, 64 * 10],
        "max-pooling": [0, 0, 0],
        "flatten": [0],
    }
    for kind, expected in products.items():
        counts = [layer.multiply_adds for layer in found if layer.what.startswith(kind)]
        assert counts == expected


def test_a_receptive_field_is_what_changes_a_number() -> None:
    features = CNN(10).features.double()
    for parameter in features.parameters():
        parameter.data.abs_()  # nothing cancels
    fields = [layer.field for layer in layers() if layer.field]
    for depth, field in enumerate(fields, 1):
        layers_so_far = [
            nn.AvgPool2d(2) if isinstance(layer, nn.MaxPool2d) else layer  # which sees all alike
            for layer in features[:depth]
        ]
        image = torch.zeros(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
        numbers = nn.Sequential(*layers_so_far)(image)
        middle = numbers.shape[-1] // 2
        (seen,) = torch.autograd.grad(numbers[0, 0, middle, middle], image)
        assert (seen[0].abs().sum((0, 1)) > 0).sum() == field


def test_the_page_on_the_network_says_what_is_computed() -> None:
    found = layers()
    parameters = sum(layer.parameters for layer in found)
    cost = sum(layer.multiply_adds for layer in found)
    linear = next(layer for layer in found if layer.what.startswith("linear"))
    second = [layer for layer in found if layer.what.startswith("convolution")][1]
    for said in (
        f"{parameters:,} parameters",
        f"{cost / 1e6:.2f} million",
        f"{linear.parameters / parameters:.0%} of these".replace("%", " %"),
        f"takes {linear.multiply_adds / cost:.2%} of".replace("%", " %"),
        f"{second.multiply_adds / cost:.0%} in the second".replace("%", " %"),
        f"= {found[0].parameters:,}\nparameters",
        f"turn {math.prod(found[-3].shape):,} numbers into ten",
    ):
        assert re.sub(r"\s+", " ", said) in re.sub(r"\s+", " ", NETWORK_PAGE)
    assert f"**{cost:,}**" in [*layers_table()][-1]


def test_the_three_images_are_what_they_are_called() -> None:
    right, unsure, wrong = three_images()
    predicted = [max(range(10), key=each["outputs"].__getitem__) for each in (right, wrong)]
    assert predicted[0] == right["label"]
    assert predicted[1] != wrong["label"]
    sure = [softmax(torch.tensor([each["outputs"]])).max() for each in (right, unsure, wrong)]
    assert sure[1] < sure[2] < sure[0]


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="needs Chromium")
def test_the_figures_move(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    static = DOCS / "_static"
    file = tmp_path / "page.html"
    file.write_text(
        f"<!doctype html><meta charset=utf-8><style>{(static / 'lessons.css').read_text()}</style>"
        f"{loss_figure('cross_entropy')}{alike_figure()}"
        f"<script>{(static / 'lessons.js').read_text()}</script>"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[object] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(file.as_uri())
        figure = page.locator("figure.loss")
        figure.get_by_label("class 2, wrong").check()
        figure.locator("input[type=range]").fill(str(STEPS.index(-4)))
        expected = point("cross_entropy", (0.1, 0.2, -4))
        assert figure.locator("output.value").inner_text() == f"{expected.value:.4f}".rstrip("0")
        cells = figure.locator("tbody tr").nth(2).locator("td").all_inner_texts()
        shown = [float(cell.replace("−", "-")) for cell in cells]
        numbers = [expected.probabilities[2], expected.gradient[2]]
        assert shown == pytest.approx([2, -4, 0, *numbers], abs=1e-4)
        page.locator("figure.alike input").fill(str(SHARES.index(0.5)))
        assert page.locator("[data-loss=l1] output").inner_text() == "0 to 1"
        assert page.locator("[data-loss=mse] output").inner_text() == "0.5"
        assert errors == []
        browser.close()
