"""The report of a comparison, made of planted results."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import io
import itertools
import json
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import optuna
import pandas as pd
import pytest
from planted_results import planted_results

from experiments import report
from experiments.comparison.assessment import assess
from experiments.comparison.results import Results
from experiments.reporting import figure_data, rendering, sections
from tracking.examples import ExamplePicker, Examples, draw_examples

pytestmark = pytest.mark.usefixtures("quiet_optuna")

THREE = ("cross_entropy", "mse", "l1")
EVIL = "</script><img src=http://evil.example/x onerror=alert(1)>"
CLASSES = (EVIL, "=cmd()", "a|b", "$x^2$", "日本語", "two\nlines", "[l](http://evil.example)", "-1")
NOT_SHOWN = ("repeats", "curves", "confirmed", "best_settings")
"""The tables of a report on staged searches that no part of the page shows as they are."""
VOID = {"meta", "br", "img", "link", "input", "hr", "source"}


class Page(HTMLParser):
    """A page, as far as the tests ask about it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: dict[str, list[str]] = {}
        self.inside: list[str] = []
        self.parents: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.parents += [(tag, parent) for parent in self.inside[-1:]]
        self.words.setdefault(tag, []).append("")
        if tag not in VOID:
            self.inside.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.inside.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.inside.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.inside):
            self.words[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def harmful_results() -> Results:
    results = planted_results(
        name=EVIL,
        search="staged",
        losses=("cross_entropy", "mse", EVIL),
        searches=3,
        trials=9,
        repeats=3,
        classes=CLASSES,
        diverging={EVIL: 0.2},
    )
    to_use = assess(results).to_use
    assert to_use is not None
    return replace(results, examples={to_use["run_id"]: some_examples()})


def some_examples() -> Examples:
    """Return right and wrong predictions of images, of classes with bad names."""
    random = np.random.default_rng(0)
    images = random.integers(256, size=(6, 32, 32, 3), dtype=np.uint8)
    probabilities = random.dirichlet(np.ones(len(CLASSES)), 6).astype(np.float32)
    labels = probabilities.argmax(axis=1)
    labels[:2] = (labels[:2] + 1) % len(CLASSES)
    picker = ExamplePicker()
    picker.add(np.arange(6), [f"test[{row}]" for row in range(6)], labels, probabilities)
    return picker.examples(CLASSES, images.__getitem__)


def written(results: Results, folder: Path) -> Page:
    rendering.write_report(results, assess(results), folder)
    return Page((folder / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path, Page]:
    """A report with everything, and names that are out to do harm."""
    results = harmful_results()
    folder = tmp_path_factory.mktemp("report") / "report"
    return results, folder, written(results, folder)


# Expected validation performance


@pytest.mark.parametrize("n", range(1, 8))
def test_the_expected_best_is_the_mean_over_all_subsets(n: int) -> None:
    values = np.random.default_rng(n).choice([0.1, 0.1, 0.35, 0.6, 0.7], n) + 0.01 * (n % 3)
    subsets = [list(itertools.combinations(values, k)) for k in range(1, n + 1)]
    brute = [np.mean([max(subset) for subset in of_k]) for of_k in subsets]
    np.testing.assert_allclose(figure_data.expected_best(values), brute, rtol=1e-12)


def test_the_expected_best_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    draws = rng.uniform(size=(20_000, 5))
    estimates = np.mean([figure_data.expected_best(row) for row in draws], axis=0)
    np.testing.assert_allclose(estimates, [k / (k + 1) for k in range(1, 6)], atol=0.004)


def test_the_expected_best_of_many_trials_stays_exact() -> None:
    values = np.arange(1.0, 1001.0)
    expected = [k * 1001 / (k + 1) for k in range(1, 1001)]  # of ranks, that is known
    np.testing.assert_allclose(figure_data.expected_best(values), expected, rtol=1e-9)


def test_nothing_is_expected_of_no_trials() -> None:
    assert figure_data.expected_best([]).shape == (0,)


def test_of_draws_that_depend_on_each_other_no_expected_best_is_shown(tmp_path: Path) -> None:
    made = written(planted_results(losses=THREE[:1], search="tpe"), tmp_path / "report")
    assert "the sampler tpe depend on each other" in made.text
    assert not (tmp_path / "report/figures/budget.png").exists()
    assert pd.read_csv(tmp_path / "report/data/budget.csv").empty


# The page by itself


def test_the_page_refers_to_nothing_outside_of_it(whole: tuple[Results, Path, Page]) -> None:
    made = whole[2]
    for tag, attributes in made.elements:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href", "srcset", "action", "data", "poster"):
                assert value.startswith(("#", "data:")), (tag, name, value[:80])
            for target in re.findall(r"url\(([^)]*)\)", value):
                assert target.startswith("#"), (tag, name, value)
    assert not made.all("link")
    (style,) = made.words["style"]
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_forbids_itself_all_but_its_own_scripts(
    whole: tuple[Results, Path, Page],
) -> None:
    made = whole[2]
    policy = next(meta["content"] for meta in made.all("meta") if "http-equiv" in meta)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    kinds = zip(made.all("script"), made.words["script"], strict=True)
    run = [text for attributes, text in kinds if "type" not in attributes]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert rules["script-src"].split() == [f"'sha256-{digest}'" for digest in digests]
    assert len(run) == 2  # Plotly's, once, and ours


def test_the_page_is_a_few_megabytes(whole: tuple[Results, Path, Page]) -> None:
    assert len(whole[2].text) < 7e6


def test_headings_figures_and_tables_can_be_followed_by_ear(
    whole: tuple[Results, Path, Page],
) -> None:
    made = whole[2]
    assert made.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in made.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(made.all("figcaption")) == len(made.all("figure")) > 10
    assert all(text.strip() for text in made.words["figcaption"])
    for attributes in made.all("svg"):
        assert attributes["role"] == "img"
        assert attributes["aria-label"]
    assert len(made.all("caption")) == len(made.all("table")) >= 7
    assert all(attributes["scope"] in ("row", "col") for attributes in made.all("th"))
    identifiers = [attributes["id"] for _, attributes in made.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for attributes in made.all("a"):
        if attributes["href"].startswith("#"):
            assert attributes["href"][1:] in identifiers


def test_figures_have_the_colours_of_the_page(whole: tuple[Results, Path, Page]) -> None:
    made = whole[2]
    styles = " ".join(attributes.get("style", "") for _, attributes in made.elements)
    assert "currentColor" in styles
    assert "var(--accent)" in styles
    assert "#000000" not in styles
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", styles)
    assert not [tag for tag, parent in made.parents if tag == "style" and parent != "head"]


# Names that are out to do harm


def test_names_do_no_harm_in_the_page(whole: tuple[Results, Path, Page]) -> None:
    made = whole[2]
    (image,) = made.all("img")  # the sheet of images
    assert image["src"].startswith("data:image/png;base64,")
    assert not [name for _, attributes in made.elements for name in attributes if name[:2] == "on"]
    assert EVIL in made.words["h1"][0]
    assert any(EVIL in text for text in made.words["th"])
    assert any("two\\nlines" in text for text in made.words["text"])
    assert any("$x^2$" in text for text in made.words["text"])


def test_names_do_no_harm_in_the_plots(whole: tuple[Results, Path, Page]) -> None:
    made = whole[2]
    kinds = zip(made.all("script"), made.words["script"], strict=True)
    plots = [json.loads(text) for attributes, text in kinds if "type" in attributes]
    assert len(plots) == 3
    names = [trace.get("name", "") for plot in plots for trace in plot["data"]]
    labels = [note["text"] for plot in plots for note in plot["layout"].get("annotations", [])]
    assert any("&lt;img" in name for name in names)
    assert any("&lt;img" in label for label in labels)
    assert not any("<" in text for text in [*names, *labels])


def test_names_do_no_harm_in_markdown(whole: tuple[Results, Path, Page]) -> None:
    from markdown_it import MarkdownIt

    text = (whole[1] / "report.md").read_text("utf-8")
    made = Page(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))
    assert [image["src"] for image in made.all("img")] == [
        f"figures/{name}.png" for name in sections.FIGURES
    ]
    links = {link["href"] for link in made.all("a")}
    assert links == {
        *(f"data/{name}.csv" for name in sections.TABLES if name not in NOT_SHOWN),
        "report.html",
    }
    assert all((whole[1] / link).exists() for link in links)
    assert not made.all("script")
    rows = text.splitlines()
    widths = [len(re.findall(r"(?<!\\)\|", row)) for row in rows if row.startswith("|")]
    heads = [width for row, width in zip(rows, widths, strict=False) if "---" in row]
    assert len(made.all("table")) >= 7, heads


# The data


def read(file: Path | bytes) -> pd.DataFrame:
    """Return a table of the report as it was before it was made harmless."""
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    table = pd.read_csv(source, keep_default_na=False, na_values=[""])
    texts = table.select_dtypes(["object", "string"]).columns
    return table.assign(**{name: table[name].str.replace("^'", "", regex=True) for name in texts})


def test_images_are_those_of_the_configuration_to_use(
    whole: tuple[Results, Path, Page], tmp_path: Path
) -> None:
    results, folder, page = whole
    sheet = io.BytesIO()
    draw_examples(some_examples(), sheet)
    assert (folder / "figures/examples.png").read_bytes() == sheet.getvalue()
    (shown,) = [image for image in page.all("img") if "least sure" in image["alt"]]
    start, content = shown["src"].split(",")
    assert start == "data:image/png;base64"
    assert base64.b64decode(content) == sheet.getvalue()

    of_another = replace(results, examples={"another": some_examples()})
    assert written(of_another, tmp_path / "without").all("img") == []
    assert not (tmp_path / "without/figures/examples.png").exists()


def test_the_data_is_that_of_the_results(whole: tuple[Results, Path, Page]) -> None:
    results, folder, _ = whole
    expected = {
        "trials": results.trials,
        "repeats": results.repeats,
        "curves": results.curves,
        "budget": figure_data.budget(results),
        "learning_curves": figure_data.learning_curves(results),
        "importances": figure_data.importances(results),
        "confusions": figure_data.confusions(results),
        "speed": figure_data.speed(results).reset_index(drop=True),
        "table": assess(results).table,
        "pairs": assess(results).pairs,
    }
    for name, frame in expected.items():
        pd.testing.assert_frame_equal(
            read(folder / f"data/{name}.csv"), frame.reset_index(drop=True), check_dtype=False
        )
    assert {file.stem for file in (folder / "data").iterdir()} == set(sections.TABLES)


def test_no_cell_of_the_data_is_a_formula(whole: tuple[Results, Path, Page]) -> None:
    table = pd.read_csv(whole[1] / "data/confusions.csv")
    assert "'=cmd()" in set(table["true"])
    assert "'-1" in set(table["predicted"])


def test_the_page_has_the_same_data(whole: tuple[Results, Path, Page]) -> None:
    _, folder, made = whole
    links = [link for link in made.all("a") if "download" in link]
    assert {link["download"] for link in links} == {
        f"{name}.csv" for name in sections.TABLES if name not in NOT_SHOWN
    }
    for link in links:
        head, _, content = link["href"].partition(",")
        assert head == "data:text/csv;charset=utf-8;base64"
        assert (
            base64.b64decode(unquote(content)) == (folder / "data" / link["download"]).read_bytes()
        )


def test_confusions_are_counted(whole: tuple[Results, Path, Page]) -> None:
    results = whole[0]
    table = figure_data.confusions(results)
    for loss, counts in results.confusions.items():
        of_loss = table[table["loss"] == loss]
        assert of_loss["images"].sum() == counts.sum()
        shares = of_loss.groupby("true")["share"].sum()
        np.testing.assert_allclose(shares, 1)


def test_the_most_frequent_confusions_come_first() -> None:
    counts = np.array([[90, 3, 7], [0, 99, 1], [5, 0, 80]])
    assert figure_data.most_confused(counts, 3) == [(0, 2), (2, 0), (0, 1)]
    assert len(figure_data.most_confused(counts, 9)) == 4


def test_curves_are_of_the_repeats_with_the_range_over_seeds() -> None:
    results = planted_results(losses=THREE[:1], repeats=3)
    table = figure_data.learning_curves(results)
    last = table.iloc[-1]
    accuracies = results.repeats["val_accuracy"]
    assert (last["stage"], last["epoch"], last["trainings"]) == ("confirm", 6, 3)
    assert last["val_accuracy"] == pytest.approx(accuracies.mean())
    assert (last["val_accuracy_low"], last["val_accuracy_high"]) == (
        accuracies.min(),
        accuracies.max(),
    )


def test_a_seed_that_diverged_is_in_no_mean_but_is_counted(tmp_path: Path) -> None:
    results = planted_results(losses=THREE[:1], trials=3, repeats=3)
    last = results.repeats["trial"].max()
    cut = (results.curves["stage"] == "confirm") & (results.curves["trial"] == last)
    curves = results.curves[~cut | (results.curves["epoch"] < 3)]
    made = replace(results, curves=curves)
    assert set(figure_data.learning_curves(made)["trainings"]) == {2}
    assert (
        "in the mean of 2 seeds of 3 (the others ended early)"
        in written(made, tmp_path / "report").text
    )


# Files


def test_the_same_results_give_the_same_bytes(
    whole: tuple[Results, Path, Page], tmp_path: Path
) -> None:
    folder = whole[1]
    written(harmful_results(), tmp_path / "report")
    assert digests(tmp_path / "report") == digests(folder)
    assert set(digests(folder)) == set(rendering.FILES)


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_new_report_takes_the_place_of_the_old_and_of_nothing_else(tmp_path: Path) -> None:
    written(planted_results(losses=THREE[:1], trials=2, repeats=1), tmp_path)
    (tmp_path / "data/mine.csv").write_text("mine")
    assert (tmp_path / "figures/confusions.png").exists()
    written(planted_results(losses=THREE[:1], trials=2, repeats=0), tmp_path)
    assert not (tmp_path / "figures/confusions.png").exists()
    assert (tmp_path / "data/mine.csv").read_text() == "mine"
    assert not list(tmp_path.glob(".draft-*"))


def test_a_report_that_can_not_be_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes, before = Path.write_bytes, list(rendering.FILES)

    def fill_up(file: Path, content: bytes) -> int:
        if file.name == before[-2]:
            raise OSError(28, "No space left on device")
        return write_bytes(file, content)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(ValueError, match="can't write the report: No space left on device"):
        written(planted_results(losses=THREE[:1], trials=1, repeats=0), tmp_path / "report")
    assert not list(tmp_path.iterdir())


# Results that are not whole


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"repeats": 0}, "No configuration is confirmed yet"),
        ({"is_tested": False}, "No model has seen the test split"),
        (
            {"trials": 0, "repeats": 0},
            "The search is not over. Losses with fewer than 4 trials: mse (0).",
        ),
        ({"trials": 1, "repeats": 1, "batch_sizes": (32,)}, "of one trial"),
    ],
)
def test_what_is_missing_is_said(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    results = planted_results(losses=("mse",), **({"trials": 4} | changes))
    made = written(replace(results, plan=results.plan | {"trials": 4}), tmp_path / "report")
    assert says in made.text
    assert says.replace("(", "").split("(")[0][:12] in (tmp_path / "report/report.md").read_text()


def test_results_of_which_nothing_completed_are_reported(tmp_path: Path) -> None:
    results = planted_results(losses=("mse", "l1"), trials=3, repeats=0)
    diverged = results.trials.assign(outcome="diverged", val_accuracy=0.1)
    failed = results.trials.assign(
        outcome="failed", val_accuracy=np.nan, batch_size=np.nan, learning_rate=np.nan
    )
    for number, trials in enumerate((diverged, failed)):
        made = written(
            replace(results, trials=trials, curves=results.curves.iloc[:0], studies={}),
            tmp_path / str(number),
        )
        assert "No trial of mse, l1 completed" in made.text
        assert "none of which completed" in made.text or "nothing to show" in made.text
        assert "No trial has finished yet." in made.text


def test_a_loss_without_repeats_has_its_place_beside_the_others(tmp_path: Path) -> None:
    results = planted_results(losses=("mse", "l1"), trials=3, repeats=2)
    repeats = results.repeats
    repeats = repeats[(repeats["loss"] == "mse") & (repeats["trial"] < 1)]
    curves = results.curves[results.curves["loss"] == "mse"]
    confusions = {"mse": results.confusions["mse"]}
    made = written(
        replace(results, repeats=repeats, curves=curves, confusions=confusions), tmp_path / "report"
    )
    assert "Losses with fewer than 2 repeats: mse (1), l1 (0)." in made.text
    assert "none of its models has seen the test split" in made.text
    assert "no training of the best configuration" in made.text


def test_a_study_has_no_importances_without_two_accuracies() -> None:
    study = optuna.create_study(direction="maximize")
    assert figure_data.study_importances(study) == {}
    space = {"learning_rate": optuna.distributions.FloatDistribution(0.1, 1.0, log=True)}
    for rate in (0.2, 0.4):
        study.add_trial(
            optuna.trial.create_trial(
                value=0.5, params={"learning_rate": rate}, distributions=space
            )
        )
    assert figure_data.study_importances(study) == {}


# The command line


@pytest.fixture
def one_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage with the comparison `planted`."""

    def load_results(name: str, storage: str) -> Results:
        return planted_results(losses=("mse",), trials=2, repeats=1)

    def find_study(name: str, storage: str) -> optuna.Study:
        if name != "planted":
            raise ValueError(f"there is no comparison {name!r} in {storage}")
        study = optuna.create_study(study_name=name)
        study.set_user_attr("plan", {})
        return study

    monkeypatch.setattr("experiments.comparison.loading.load_results", load_results)
    monkeypatch.setattr("experiments.reporting.sweep_report.find_study", find_study)


@pytest.mark.usefixtures("one_comparison")
def test_the_command_writes_a_report_and_says_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["planted", "--out", str(tmp_path / "out")]) == 0
    assert set(rendering.FILES) >= set(digests(tmp_path / "out")) >= {"report.html", "report.md"}
    out, err = capsys.readouterr()
    results = planted_results(losses=("mse",), trials=2, repeats=1)
    assert out.splitlines()[:2] == list(assess(results).statements[:2])
    assert out.splitlines()[-1] == f"report: {tmp_path / 'out/report.html'}"
    assert not err


@pytest.mark.usefixtures("one_comparison")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["other"], "there is no comparison 'other' in sqlite:///optuna.db"),
        (["planted", "--out", "no/where"], "can't write --out: there is no folder"),
        ([], "the following arguments are required: STUDY"),
    ],
)
def test_what_can_not_be_reported_is_one_line(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert not list(tmp_path.iterdir())


# In a browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Shows the page at a width, and writes down what came of it.
FRAME = """<!DOCTYPE html><iframe src="report.html" style="width:{}px;height:800px"></iframe>
<script>
  const frame = document.querySelector("iframe");
  frame.onload = () => setTimeout(() => {
    const page = frame.contentDocument;
    document.title = JSON.stringify({
      width: page.documentElement.scrollWidth,
      plots: page.querySelectorAll(".main-svg").length,
      plot_width: Math.max(...[...page.querySelectorAll(".main-svg")].map((e) => e.clientWidth)),
      requests: frame.contentWindow.performance.getEntriesByType("resource").length,
      ink: frame.contentWindow.getComputedStyle(page.querySelector(".xtick text")).fill,
      cut: [...page.querySelectorAll(".scroll")]
        .filter((frame) => frame.scrollWidth > frame.clientWidth).length,
      first_column: [...page.querySelectorAll("table.table tbody th")].map((cell) => {
        const frame = cell.closest(".scroll");
        frame.scrollLeft = 1000;
        return cell.getBoundingClientRect().left - frame.getBoundingClientRect().left;
      }),
      label: page.querySelector("#plot-parallel .annotation .bg").style.fill,
    });
  }, 500);
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize(
    ("scheme", "ink", "paper"),
    [
        ("0", "rgb(230, 230, 230)", "rgb(20, 23, 28)"),
        ("1", "rgb(27, 27, 27)", "rgb(255, 255, 255)"),
    ],
)
def test_the_page_fits_a_phone_and_asks_for_nothing(
    whole: tuple[Results, Path, Page], scheme: str, ink: str, paper: str, tmp_path: Path
) -> None:
    found = looked_at(whole[1] / "report.html", 360, scheme, tmp_path)
    assert found["width"] <= 360
    assert found["plots"] >= 3
    assert 200 < found["plot_width"] <= 360
    assert found["requests"] == 0
    assert found["ink"] == ink
    assert found["label"] == paper
    assert found["cut"] > 0  # wide tables scroll in their frame, and their first column stays
    assert len(found["first_column"]) > 10
    assert max(map(abs, found["first_column"])) < 1


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
@pytest.mark.parametrize("search", ["staged", "random"])
def test_all_tables_are_complete_on_a_laptop(search: str, tmp_path: Path) -> None:
    results = planted_results(search=search, searches=3, trials=24, diverging={"l1": 0.3})
    written(results, tmp_path / "report")
    found = looked_at(tmp_path / "report/report.html", 1280, "1", tmp_path)
    assert found["width"] <= 1280
    assert found["cut"] == 0


def looked_at(page: Path, width: int, scheme: str, folder: Path) -> dict[str, Any]:
    """Open a page in Chromium, and return what `FRAME` writes down."""
    assert CHROMIUM
    shutil.copy(page, folder)
    (folder / "frame.html").write_text(FRAME.replace("{}", str(width)))
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                f"--user-data-dir={folder / 'profile'}",
                "--enable-logging=stderr",
                "--window-size=1400,900",
                f"--blink-settings=preferredColorScheme={scheme}",
                "--virtual-time-budget=10000",
                "--dump-dom",
                f"http://127.0.0.1:{server.server_address[1]}/frame.html",
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        server.shutdown()
    assert "CONSOLE" not in done.stderr  # where what the page's policy refuses is said, too
    found: dict[str, Any] = json.loads(Page(done.stdout).words["title"][0])
    return found


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass
