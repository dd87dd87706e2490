"""How often is true what a comparison says? `python -m benchmarks.planted`.

It draws comparisons of which the truth is known: losses of equal best accuracy, whose best learning
rates lie anywhere from where half of the range diverges to half a decade beyond it. Their searches
are run by the rule of `experiments.compare`, in pools from which studies draw. It prints

- how far the chosen configuration is below the best one, and how much that depends on where the
  best learning rate lies (unfairness), beside random search and TPE;
- how often losses of equal best accuracy are said to differ, or anything else that is not so;
- how often the intervals cover the truth;
- how often a lead of half a point or one point is shown, by how a number of trainings is shared
  among searches;
- how often the chosen configuration diverges, where that depends on the seed.

The Monte-Carlo standard error of a share is at most 0.5 / √studies, and that of one near 5 % is 0.8
points for 800.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from benchmarks.common import make_parser, markdown
from benchmarks.planted_judging import check, judge, verify
from benchmarks.planted_studies import OWN_EASE, Images, Tuned, draw
from benchmarks.planted_worlds import BEST, CHANCE, POSITIONS, REST, Floats, Pool, lucky

DEFAULT = "staged-11"
REGRETS = {
    "staged-9": 1, "staged-11": 1, "staged-13": 1, "staged-20": 1,
    "random-11": 1, "random-12": 1, "random-22": 1, "random-60": 1,
    "tpe-11": 0.03, "tpe-22": 0.03, "tpe-60": 0.03,
}  # fmt: skip
"""Ways to search, and the share of the searches for which there is time."""
NAMES = {"staged": "staged", "random": "random", "tpe": "TPE"}
LEADS = (0.005, 0.01)
EACH = 500
"""Of so many studies, one is assessed as a whole."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is drawn."""

    studies: int = 800
    """Of each cell of a table."""
    pooled: int = 100
    """Searches of a loss."""
    shapes: int = 12
    """Of losses, for each position of the optimum."""
    images: int = 10_000
    """Of a test split."""
    seed: int = 0
    losses: Sequence[int] = (2, 3, 6, 14)
    searches: Sequence[int] = (3, 4, 5, 10)
    regrets: Mapping[str, float] = field(default_factory=REGRETS.copy)
    budgets: Mapping[int, Sequence[int]] = field(
        default_factory=lambda: {60: (3, 4, 5, 6, 8, 10), 80: (4, 5, 6, 8, 10)}
    )
    """Trainings of a loss, and the numbers of searches that may share them."""

    def pool(self, method: str, noise: str = "normal", share: float = 1) -> Pool:
        """Return what to search for."""
        return Pool(
            method=method,
            noise=noise,
            shapes=self.shapes,
            searches=max(1, round(share * self.pooled)),
            seed=self.seed,
        )


QUICK = Size(
    studies=2,
    pooled=5,
    shapes=1,
    images=500,
    losses=(2, 3),
    searches=(3,),
    regrets={"staged-11": 1, "random-12": 1, "tpe-12": 0.2},
    budgets={60: (5,)},
)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, assess and print."""
    parser = make_parser("planted", __doc__)
    parser.add_argument("--studies", type=int, default=Size.studies, help="of each cell of a table")
    parser.add_argument("--images", type=int, default=Size.images, help="of a test split")
    parser.add_argument("--seed", type=int, default=Size.seed, help="of the draws")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--quick", action="store_true", help="two studies, to see that it works")
    options = parser.parse_args(argv)
    size = Size(studies=options.studies, images=options.images, seed=options.seed)
    if options.quick:
        size = replace(QUICK, seed=options.seed)
    if options.workers == 1:
        tables(size, map)
        return
    with ProcessPoolExecutor(options.workers) as processes:
        tables(size, processes.map)


Map = Callable[..., Iterable[Any]]


def tables(size: Size, do: Map) -> None:
    """Print all tables."""
    print(f"Points below the best configuration\n\n{regrets(size, do)}\n", flush=True)
    said = statements(size, do)
    print(f"False statements about equal losses\n\n{false_statements(size, said)}\n", flush=True)
    print(f"Intervals that cover\n\n{coverage(size, said)}\n", flush=True)
    print(f"Leads that are shown\n\n{power(size, do)}\n", flush=True)
    print(f"Where the cliff moves\n\n{failures(size, do)}", flush=True)


# Searches


def searched(pools: Sequence[Pool], do: Map) -> list[tuple[Floats, Floats]]:
    """Return expected accuracies and shares that diverge, of each pool: by position."""
    keys = [(pool, place) for pool in pools for place in range(len(POSITIONS))]
    found = list(do(_at, keys))
    return [
        tuple(np.stack(each) for each in zip(*found[at : at + len(POSITIONS)], strict=True))  # type: ignore[misc]
        for at in range(0, len(found), len(POSITIONS))
    ]


@cache
def _at(key: tuple[Pool, int]) -> tuple[Floats, Floats]:
    return key[0].at(key[1])


def regrets(size: Size, do: Map) -> str:
    """Return a table of how far chosen configurations are below the best ones."""
    pools = [size.pool(method, share=share) for method, share in size.regrets.items()]
    rows = []
    for pool, (accuracies, _) in zip(pools, searched(pools, do), strict=True):
        accuracies = np.nan_to_num(accuracies, nan=CHANCE)
        rows.append([named(pool.method), *regret(accuracies)])
        if pool.method == DEFAULT:
            best = best_of_five(accuracies, np.random.default_rng(size.seed))
            rows.append([f"{named(pool.method)}; the best of five", *regret(best)])
    header = ["search, trials a loss", *(f"{place:g}" for place in POSITIONS)]
    return markdown([*header, "mean", "unfairness", "standard error"], rows)


def regret(accuracies: Floats) -> list[str]:
    """Return the means of what is lost: at each position; of all, and their range."""
    lost = 100 * (BEST - accuracies)
    means = lost.mean(axis=(1, 2))
    errors = lost.std(axis=(1, 2)) / lost[0].size ** 0.5
    found = [*means, means.mean(), np.ptp(means), errors.max()]
    return [f"{value:.2f}" for value in found]


def best_of_five(accuracies: Floats, rng: np.random.Generator) -> Floats:
    """Return the expected accuracies of the choices that are best on a fresh seed, of each five."""
    fives = accuracies.reshape(*accuracies.shape[:2], -1, 5)
    fresh = lucky(fives, "normal", rng) + REST * rng.normal(size=fives.shape)
    best: Floats = np.take_along_axis(fives, fresh.argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    return best


def named(method: str) -> str:
    """Return a method and its trials in words."""
    name, trials = method.split("-")
    return f"{NAMES[name]}, {trials}"


def failures(size: Size, do: Map) -> str:
    """Return a table of how often chosen configurations diverge, if the cliff moves."""
    pools = [size.pool(f"staged-{trials}", "moving cliff") for trials in (11, 13, 20)]
    pools.append(size.pool("random-12", "moving cliff"))
    rows = []
    for pool, (accuracies, diverge) in zip(pools, searched(pools, do), strict=True):
        regret = 100 * (BEST - accuracies).mean(axis=(1, 2))
        row = [f"{diverge.mean():.1%}", f"{diverge.mean(axis=(1, 2)).max():.1%}"]
        row += [f"{regret.mean():.2f}", f"{np.ptp(regret):.2f}"]
        rows.append([named(pool.method), *row])
    header = ["search, trials a loss", "finals that diverge", "at the worst position"]
    return markdown([*header, "points below the best", "unfairness"], rows)


# Statements


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Studies of one kind."""

    pool: Pool
    losses: int
    searches: int
    studies: int
    images: int
    own: float = OWN_EASE
    lead: float = 0.0
    """How much better the first loss is."""
    seed: int = 0
    is_staged: bool = True
    accuracies: bytes = b""
    """Of the pool."""


def counted(cells: Sequence[Cell], do: Map) -> list[Counter[str]]:
    """Return what was counted in each cell."""
    pools = list(dict.fromkeys(cell.pool for cell in cells))
    found = {
        pool: accuracies.tobytes()
        for pool, (accuracies, _) in zip(pools, searched(pools, do), strict=True)
    }
    return list(do(count, [replace(cell, accuracies=found[cell.pool]) for cell in cells]))


def count(cell: Cell) -> Counter[str]:
    """Draw the studies of a cell, and count what is said and true of them."""
    rng = np.random.default_rng([cell.seed, cell.losses, cell.searches])
    images = _images(cell.own, cell.images)
    shape = (len(POSITIONS), cell.pool.shapes, cell.pool.searches)
    pools = np.frombuffer(cell.accuracies).reshape(shape)
    # One random search in 1,000 finds nothing: the middle one takes its place.
    pools = np.where(np.isnan(pools), np.nanmedian(pools, axis=-1, keepdims=True), pools)

    def tuned(place: int, shape: int, lead: float) -> Tuned:
        chosen = (pools[place, shape] + lead).tobytes()
        return _tuned(chosen, cell.pool.noise, images, BEST + lead)

    counts: Counter[str] = Counter()
    for number in range(cell.studies):
        places = np.resize(rng.permutation(len(POSITIONS)), cell.losses)
        shapes = rng.integers(cell.pool.shapes, size=cell.losses)
        leads = [cell.lead, *[0.0] * (cell.losses - 1)]
        losses = [
            tuned(int(place), int(shape), lead)
            for place, shape, lead in zip(places, shapes, leads, strict=True)
        ]
        study = draw(losses, cell.searches, rng, is_staged=cell.is_staged)
        said = judge(study)
        if number % EACH == 0:
            check(study, said)
        counts.update(verify(study, said))
    return counts


@cache
def _images(own: float, count: int) -> Images:
    return Images(own=own, count=count)


@cache
def _tuned(chosen: bytes, noise: str, images: Images, best: float) -> Tuned:
    return Tuned(chosen=np.frombuffer(chosen), noise=noise, images=images, best=best)


def share(counts: Counter[str], what: str) -> str:
    """Return the share in which something was true, of the times that it could be."""
    return f"{counts[what] / counts[f'{what} of']:.1%}"


Kind = tuple[str, int]
"""A method with its luck, and a number of losses."""


def statements(size: Size, do: Map) -> dict[Kind, list[Counter[str]]]:
    """Return what is said of equal losses, by number of searches.

    First of test images that favour no loss, so that losses are equal on these as well; then of
    others.
    """
    ways = [(f"staged, {noise}", DEFAULT, noise) for noise in ("normal", "skewed", "collapses")]
    ways.append(("random, normal", "random-12", "normal"))
    kinds = {
        (name, losses): [
            Cell(
                pool=size.pool(method, noise),
                losses=losses,
                searches=searches,
                studies=size.studies,
                images=size.images,
                own=own,
                seed=size.seed,
                is_staged=method == DEFAULT,
            )
            for own in (0.0, OWN_EASE)
            for searches in size.searches
        ]
        for name, method, noise in ways
        for losses in size.losses
    }
    found = iter(counted([cell for cells in kinds.values() for cell in cells], do))
    return {kind: [next(found) for _ in cells] for kind, cells in kinds.items()}


def false_statements(size: Size, said: Mapping[Kind, Sequence[Counter[str]]]) -> str:
    """Return a table of how often anything is said of equal losses that is not so."""
    n = len(size.searches)
    rows = [
        [
            *(name, f"{losses}"),
            *(share(each, "false these") for each in counts[:n]),
            *(share(each, "false new") for each in counts[n:]),
        ]
        for (name, losses), counts in said.items()
    ]
    return markdown(["search, luck", "losses", *by_images(size)], rows)


def by_images(size: Size) -> list[str]:
    """Return the heads of columns, by images and number of searches."""
    return [f"{images}, n = {n}" for images in ("these images", "new") for n in size.searches]


def coverage(size: Size, said: Mapping[Kind, Sequence[Counter[str]]]) -> str:
    """Return a table of how often intervals cover."""
    n = len(size.searches)
    names = [name for name in dict.fromkeys(name for name, _ in said) if "staged" in name]
    rows = []

    def add(name: str, interval: str, what: str, counts: Sequence[Counter[str]]) -> None:
        found = [share(each, f"{what} {images}") for images in ("these", "new") for each in counts]
        rows.append([name, interval, *found])

    for name in names:
        groups = [counts[n:] for (of, _), counts in said.items() if of == name]
        pooled: list[Counter[str]] = [sum(each, Counter()) for each in zip(*groups, strict=True)]
        add(name, "a loss' accuracy", "accuracy", pooled)
        add(name, "a pair's difference", "difference", pooled)
        for losses, counts in zip(size.losses, groups, strict=True):
            add(name, f"the winner's accuracy, {losses} losses", "winner", counts)
    return markdown(["search, luck", "interval of", *by_images(size)], rows)


def power(size: Size, do: Map) -> str:
    """Return a table of how often a lead is shown, by how trainings are shared."""
    kinds = [
        (budget, searches, budget // searches - 1)
        for budget, options in size.budgets.items()
        for searches in options
    ]
    pools = [size.pool(f"staged-{trials}", share=1 / 3) for *_, trials in kinds]
    cells = [
        Cell(
            pool=pool,
            losses=losses,
            searches=searches,
            studies=max(1, size.studies // 2),
            images=size.images,
            lead=lead,
            seed=size.seed,
        )
        for pool, (_, searches, _) in zip(pools, kinds, strict=True)
        for losses in (2, 6)
        for lead in LEADS
    ]
    found = iter(counted(cells, do))
    rows = []
    for kind, (accuracies, _) in zip(kinds, searched(pools, do), strict=True):
        counts = [next(found) for _ in range(2 * len(LEADS))]
        shown = [f"{share(each, 'shown these')}, {share(each, 'shown new')}" for each in counts]
        *_, mean, unfairness, _ = regret(accuracies)
        rows.append([*map(str, kind), mean, unfairness, *shown])
    header = ["trainings", "searches", "trials", "points below the best", "unfairness"]
    header += [f"{losses} losses, {100 * lead:g} points" for losses in (2, 6) for lead in LEADS]
    return markdown(header, rows)


if __name__ == "__main__":
    main()
