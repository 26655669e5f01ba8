"""Comparisons that a grid's file plans before its runs, each question a family of its own.

    [[comparisons]]
    question = "Does a cure end above freezing?"
    metric = "knn_final"            # the default; or knn_full, jumps, worst_excess
    reference = "frozen, frozen"    # label of an arm, as the page shows it
    arms = ["beta2 0.95", "LAMB"]   # the default: all others

A page of such a grid tests these and no others, so what it claims was asked for beforehand.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mocov3_ds.stability.grid_file import check_keys, read_text

METRICS = {
    "knn_final": "k-NN final",
    "knn_full": "k-NN full",
    "jumps": "loss jumps",
    "worst_excess": "worst loss excess",
}
"""columns of a run that arms can be compared by, as a page names them"""
_KEYS = ("question", "metric", "reference", "arms")


@dataclass(frozen=True)
class PlannedComparison:
    """Arms that are compared with one, in one metric, corrected together.

    Attributes:
        question: what it asks, for people.
        metric: column of a run, of `METRICS`.
        reference: label of the arm that the others are compared with.
        arms: labels of the others.
    """

    question: str
    metric: str
    reference: str
    arms: tuple[str, ...]


def read_planned(trees: Any, labels: Sequence[str]) -> tuple[PlannedComparison, ...]:
    """The comparisons of a grid's file; none where it has none.

    Args:
        trees: value of the key `comparisons`, or None.
        labels: labels of the grid's arms.

    Raises:
        ValueError: they are no tables, or name an arm or a metric that is not there.
    """
    if trees is None:
        return ()
    if not isinstance(trees, list) or not all(isinstance(tree, dict) for tree in trees):
        raise ValueError("comparisons are tables; write [[comparisons]] above each.")
    return tuple(
        _read_one(tree, labels, f"comparison {number + 1}") for number, tree in enumerate(trees)
    )


def _read_one(tree: Mapping[str, Any], labels: Sequence[str], place: str) -> PlannedComparison:
    check_keys(tree, _KEYS, place)
    question, metric, reference = (
        read_text(tree, key, default)
        for key, default in (("question", ""), ("metric", "knn_final"), ("reference", ""))
    )
    if not question or not reference:
        raise ValueError(f"{place} needs a question and a reference.")
    check_keys([metric], [*METRICS], f"{place}, metric")
    arms = tree.get("arms", [label for label in labels if label != reference])
    if not isinstance(arms, list) or not arms or not all(isinstance(arm, str) for arm in arms):
        raise ValueError(f"{place} has arms = {arms!r}; it is a list of labels.")
    check_keys([reference, *arms], labels, f"{place}, among reference and arms,")
    if reference in arms or len({*arms}) < len(arms):
        raise ValueError(f"{place} compares an arm with itself, or twice.")
    return PlannedComparison(question, metric, reference, tuple(arms))


def as_trees(planned: Sequence[PlannedComparison]) -> list[dict[str, Any]]:
    """What `read_planned` reads back, for `grid.json`."""
    return [{**dataclasses.asdict(one), "arms": [*one.arms]} for one in planned]
