"""The plan of a comparison, and the events of its stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cnn.config import check_choice
from cnn.data import Dataset
from experiments.comparison.results import IRRELEVANT
from experiments.comparison.search_rule import RATE, SIZE, Step, steps
from experiments.study.domains import Choices, Range
from experiments.study.events import SweepEvent
from experiments.study.settings import Settings

if TYPE_CHECKING:
    from experiments.comparison.assessment import Assessment

SEARCHES = ("staged", "random", "tpe")
"""The ways to search."""

SEEDS_A_SEARCH = 1000
"""The seeds of a search, from its own; those below the first search's are of the repeats."""
_FINAL = SEEDS_A_SEARCH - 1

Pair = tuple[str, int]
"""A loss, and the number of one of its searches, from 1."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a comparison.

    Raises:
        ValueError: something is out of its range.
    """

    settings: Settings
    """Its losses, and where the searches begin; `trials` are the trainings of a search."""
    search: str = "random"
    """One of `SEARCHES`."""
    searches: int = 1
    """How often the search of each loss is repeated, if it is staged."""
    repeats: int
    """How often a best configuration is trained again: that of each loss; or, if the search is
    staged, the best one of all."""
    min_effect: float = IRRELEVANT
    """The smallest difference in accuracy that matters, in 0 .. 1."""
    reuse: bool = True
    """Whether finished trainings are found, and not made again."""

    def __post_init__(self) -> None:
        check_choice("--search", self.search, SEARCHES)
        if self.searches < 1:
            raise ValueError(f"--searches must be ≥ 1, not {self.searches}")
        if not 0 <= self.min_effect < 1:
            shown = f"{100 * self.min_effect:g}"
            raise ValueError(f"--min-effect must be points from 0 to 100, not {shown}")
        if self.repeats < 1:
            raise ValueError(f"--repeats must be ≥ 1, not {self.repeats}")
        if self.is_staged and self.repeats >= SEEDS_A_SEARCH:
            raise ValueError(f"--repeats must be < {SEEDS_A_SEARCH}, not {self.repeats}")
        most = SEEDS_A_SEARCH * (self.searches + 1) - 1 if self.is_staged else self.repeats
        if self.settings.seed + most > 2**32 - 1:
            flag = "--searches" if self.is_staged else "--repeats"
            raise ValueError(
                f"--seed {self.settings.seed} is too high for these {flag}: it must be "
                f"< {2**32 - most}"
            )

    @property
    def is_staged(self) -> bool:
        """Whether whole searches are repeated."""
        return self.search == "staged"

    @property
    def seeds(self) -> range:
        """The seeds of the repeats, which follow that of the comparison."""
        return range(self.settings.seed + 1, self.settings.seed + 1 + self.repeats)

    def fingerprint(self, data: Dataset) -> dict[str, Any]:
        """Return what makes two comparisons the same: all settings but those that may grow."""
        fingerprint = self.settings.fingerprint(data)
        if not self.is_staged:
            return fingerprint | {"trials": self.settings.trials}
        grow = ("losses", "sampler")
        same = {key: value for key, value in fingerprint.items() if key not in grow}
        return same | {"search": self.search}

    def steps(self, trials: int) -> list[Step]:
        """Return the steps of each search."""
        return steps(trials, len(self.settings.search) - 1)

    def seed_of(self, search: int, stage: str = "explore", number: int = 1) -> int:
        """Return the seed of a search's trainings in a step, or with `final` of its repeat."""
        own = {"choose": number, "final": _FINAL}
        return self.settings.seed + SEEDS_A_SEARCH * search + own.get(stage, 0)

    # The sweeps

    def search_of(self, name: str, loss: str) -> Settings:
        """Return the settings of the search for a loss' best configuration, if it isn't staged."""
        return replace(
            self.settings,
            search={**self.settings.search, "loss": Choices((loss,))},
            study=f"{name}/search/{loss}",
            options="",
            tags={"comparison": name, "stage": "search"},
        )

    def confirmation(self, name: str, winners: Sequence[Mapping[str, Any]]) -> Settings:
        """Return the settings of the repeats: all winners with the first seed, then the next."""
        configurations = [{**each, "seed": seed} for seed in self.seeds for each in winners]
        return self.fixed(f"{name}/confirm", name, "confirm", configurations)

    def fixed(
        self, study: str, name: str, stage: str, configurations: Sequence[Mapping[str, Any]]
    ) -> Settings:
        """Return the settings of a sweep over given configurations."""
        search = {
            **self.settings.search,
            "loss": Choices(tuple(dict.fromkeys(each["loss"] for each in configurations))),
        }
        if self.is_staged:  # beyond the ranges in which the searches begin
            rates = [each[RATE] for each in configurations]
            search[RATE] = Range(min(rates) / 2, max(rates) * 2, log=True)
            search[SIZE] = Choices(tuple(sorted({each[SIZE] for each in configurations})))
        return replace(
            self.settings,
            search=search,
            configurations=configurations,
            trials=len(configurations),
            study=study,
            options="",
            tags={"comparison": name, "stage": stage},
        )


@dataclass(frozen=True, kw_only=True)
class Block:
    """Searches that take their steps together. A comparison that grows gets another block."""

    number: int
    trials: int
    """Trainings of each search."""
    pairs: tuple[Pair, ...]

    @classmethod
    def of(cls, number: int, attribute: Mapping[str, Any]) -> Block:
        """Return the block that a comparison's record has as an attribute."""
        pairs = tuple((str(loss), int(search)) for loss, search in attribute["pairs"])
        return cls(number=number, trials=attribute["trials"], pairs=pairs)

    def attribute(self) -> dict[str, Any]:
        """Return the block as the record has it."""
        return {"trials": self.trials, "pairs": [list(pair) for pair in self.pairs]}

    def study(self, name: str, stage: str) -> str:
        """Return the name of a study of a comparison's block."""
        return f"{name}/{self.number}/{stage}"


def read_blocks(record: Mapping[str, Any]) -> list[Block]:
    """Return the blocks in the attributes of a comparison's record."""
    found: list[Block] = []
    while (attribute := record.get(f"block-{len(found) + 1}")) is not None:
        found.append(Block.of(len(found) + 1, attribute))
    return found


def current(blocks: Sequence[Block]) -> list[Block]:
    """Return the blocks that count: those with the most trainings a search."""
    most = max((each.trials for each in blocks), default=0)
    return [each for each in blocks if each.trials == most]


def losses_in(blocks: Sequence[Block]) -> list[str]:
    """Return the losses of blocks, in order."""
    return list(dict.fromkeys(loss for block in blocks for loss, _ in block.pairs))


def next_block(blocks: Sequence[Block], plan: Plan) -> Block | None:
    """Return the block that brings these to a plan; None if they are there. Nothing shrinks."""
    trials = max([plan.settings.trials, *(each.trials for each in blocks)])
    searches = max([plan.searches, *(search for each in blocks for _, search in each.pairs)])
    losses = dict.fromkeys([*losses_in(blocks), *plan.settings.losses])
    done = {pair for each in blocks if each.trials == trials for pair in each.pairs}
    wanted: Iterator[Pair] = (
        (loss, search) for search in range(1, searches + 1) for loss in losses
    )
    pairs = tuple(pair for pair in wanted if pair not in done)
    return Block(number=len(blocks) + 1, trials=trials, pairs=pairs) if pairs else None


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    """A stage begins."""

    title: str
    settings: Settings | None
    """Of its sweep; None if the stage is no sweep."""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The work is known, before it starts."""

    trainings: Mapping[str, int]
    """Of each loss."""
    others: int
    """Trainings of the configuration to use."""
    epochs: int
    """Of each training."""
    images: int
    """Of each epoch."""

    @property
    def total(self) -> int:
        """All trainings."""
        return sum(self.trainings.values()) + self.others


@dataclass(frozen=True, kw_only=True)
class ModelTested:
    """A confirmed model has predicted the test split."""

    loss: str
    seed: int
    accuracy: float


@dataclass(frozen=True, kw_only=True)
class ComparisonEnded:
    """The comparison is over, and everything is recorded."""

    name: str
    outcome: str
    """complete, interrupted or failed."""
    reason: str
    experiment_id: str
    parent_run_id: str
    runs_page: str
    """The address of the list of its runs in MLflow, after that of the server."""
    notes: tuple[str, ...]
    """Notes for the user, a line each."""
    assessment: Assessment | None
    """None unless the outcome is complete."""


Event = StageStarted | Planned | ModelTested | SweepEvent | ComparisonEnded
