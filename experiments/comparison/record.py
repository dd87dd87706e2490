"""The record of a comparison: an Optuna study without trials, with its decisions as attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Study

from cnn.data import Dataset
from experiments.comparison.plan import Block, Plan, losses_in, next_block, read_blocks
from experiments.study.opening import open_checked
from experiments.study.storage import set_once
from experiments.study.trial_cache import TrialCache


def open_record(plan: Plan, data: Dataset, storage: TrialCache, *, retest: bool) -> Study:
    """Open the study that holds the decisions, or make it; and add what the plan has more of.

    Raises:
        ValueError: it has another plan; or its models have seen the test split, and the plan adds
            to it without `retest`.
    """
    record = open_checked(
        "comparison",
        plan.settings,
        data,
        storage,
        prefix=f"compare-{data.name}",
        key="plan",
        fingerprint=plan.fingerprint(data),
        attributes={"data": _data_facts(data)},
        unnamed=("training",) if plan.is_staged else (),
    )
    blocks = read_blocks(record.user_attrs)
    rounds = record.user_attrs.get("test_rounds", [{}])
    more = next_block(blocks, plan) if plan.is_staged else None
    was_looked_at = "ended" in rounds[-1] and not retest
    if was_looked_at and (what := _untested(plan, more, blocks, record.user_attrs)):
        raise ValueError(
            f"models of comparison {record.study_name!r} were shown the test split already: with "
            f"{what} it would be used again, which needs --retest, and is recorded"
        )
    while more is not None:  # another process may add one at the same time
        set_once(record, f"block-{more.number}", more.attribute())
        more = next_block(read_blocks(record.user_attrs), plan)
    record.set_user_attr("min_effect", plan.min_effect)
    return record


def _untested(
    plan: Plan, more: Block | None, blocks: Sequence[Block], attributes: Mapping[str, Any]
) -> str:
    """Return what was not there when the test split was looked at, in words; empty for nothing."""
    if more is not None:
        return _named(more, blocks)
    last = attributes.get("test_rounds", [{}])[-1]
    seen = blocks[: last.get("blocks", len(blocks))]
    if len(seen) < len(blocks):  # a start with --retest was stopped before it looked
        return _named(blocks[len(seen)], seen)
    before = last.get("repeats", attributes.get("repeats", plan.repeats))
    return f"--repeats {plan.repeats}" if plan.repeats > before else ""


def _named(block: Block, blocks: Sequence[Block]) -> str:
    """Return what a block adds to others, in words."""
    if block.trials > max(each.trials for each in blocks):
        return f"--trials {block.trials}"
    known = losses_in(blocks)
    if new := [loss for loss in losses_in([block]) if loss not in known]:
        return f"the losses {', '.join(new)}"
    return f"--searches {max(search for _, search in block.pairs)}"


def _data_facts(data: Dataset) -> dict[str, Any]:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {
        "classes": list(data.classes),
        "sizes": {split: len(images) for split, images in splits.items()},
        "given_test": data.given_test,
    }
