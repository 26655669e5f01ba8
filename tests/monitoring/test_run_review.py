"""What is wrong with a run is said when it happens, and at the end; of a good run nothing is."""

from typing import Any

import pytest

from mocov3_ds.monitoring.run_review import RunReview

TOTAL = 100


def row(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "chance_loss": 2.0, "applied": True} | values


def review(rows: list[dict[str, Any]], total_steps: int = TOTAL) -> tuple[list[str], list[str]]:
    """What is said while the rows come, and what at their end."""
    reviewed = RunReview(total_steps)
    return [line for each in rows for line in reviewed.push(each)], reviewed.summarise()


def test_a_good_run_is_silent() -> None:
    rows = [row(step, spread=0.9) for step in range(1, TOTAL + 1)]
    rows = [{"step": 0, "knn_full": 20.0, "knn_probes": 1000}, *rows]
    rows[50]["knn"], rows[-1]["knn_full"] = 25.0, 40.0
    assert review(rows) == ([], [])
    assert review([]) == ([], [])


def test_skipped_steps_are_counted_with_their_scale() -> None:
    rows = [row(s, applied=s > 8, loss_scale=2.0 ** (16 - min(s, 8))) for s in range(1, 20)]
    live, end = review(rows)
    assert [line.partition(":")[0] for line in live] == ["step 1", "step 2", "step 4", "step 8"]
    assert live[-1].endswith("the step is skipped (8 of 8 so far; loss scale 256)")
    assert end == ["fp16: 8 steps skipped by an overflow"]


def test_bad_steps_are_no_skipped_ones() -> None:
    live, end = review([row(1, applied=False, trouble="the loss is nan")])
    assert live == []
    assert end == ["1 bad step dropped, see trouble/"]


def test_alarms_are_said_once_for_a_while() -> None:
    alarmed = [10, 11, 12, 50]
    rows = [row(s, alarms=["rms_rise"] * (s in alarmed), response="clip") for s in range(1, 60)]
    live, end = review(rows)
    assert live == [
        f"step {s}: early alarm (rms_rise), see alarms/step-{s:08d}.json; response: clip"
        for s in (10, 50)
    ]
    assert end == ["early alarms in 4 steps, see alarms/"]


def test_a_loss_that_never_leaves_its_chance_level() -> None:
    live, end = review([row(step, loss=1.999) for step in range(1, TOTAL + 1)])
    assert [line.partition(":")[0] for line in live] == [f"step {s}" for s in (10, 20, 40, 80)]
    assert "has not left its chance level (1.999 of 2)" in live[0]
    assert len(end) == 1
    assert "has not left its chance level" in end[0]
    slow = [row(step, loss=1.93) for step in range(1, TOTAL + 1)]  # on its way down
    assert review(slow) == ([], [])
    assert review([row(1, loss=2.0)]) == ([], [])  # too early to say


def test_a_loss_that_comes_back_to_its_chance_level() -> None:
    losses = [1.0] * 20 + [2.0] * 10
    live, end = review([row(step, loss=loss) for step, loss in enumerate(losses, 1)])
    words = "the loss is back at its chance level (2) since 21"
    assert live == [f"step 25: {words}"]
    assert end == [words]
    recovered = [*losses, 1.0]
    assert review([row(s, loss=loss) for s, loss in enumerate(recovered, 1)]) == (live, [])


def test_a_collapse() -> None:
    spreads = [0.9, 0.05, 0.04]
    live, end = review([row(10 * s, spread=spread) for s, spread in enumerate(spreads, 1)])
    assert len(live) == 1
    assert live[0].startswith("step 20: collapse, the queries of all images lie close together")
    assert end == ["collapsed since step 20: the queries lie together"]


def test_features_worse_than_those_of_the_random_network() -> None:
    start = {"step": 0, "knn_full": 20.0, "knn_probes": 400}  # deviation 2 points
    live, end = review([start, row(5, knn=1.0), row(50, knn=17.0), row(60, knn=15.0)])
    assert live == ["step 60: k-NN accuracy 15.00 % is below the 20.00 % of the start"]
    assert end == ["k-NN accuracy is below the 20.00 % of the start"]
    _, end = review([start, row(100, knn_full=19.0)])
    assert end == ["k-NN accuracy 19.00 % at the end, 20.00 % at the start"]


@pytest.mark.parametrize("value", [None, "x", [], {}, float("nan"), True, -1, 1e300])
def test_rows_of_strangers(value: Any) -> None:
    names = (
        "loss", "chance_loss", "applied", "trouble", "alarms", "response", "spread", "knn",
        "knn_full", "knn_probes", "loss_scale",
    )  # fmt: skip
    for name in names:
        for odd in (value, 10**400):
            review([{"step": 0, name: odd}, *(row(step, **{name: odd}) for step in range(1, 40))])


def test_losses_that_are_not_finite_are_counted_where_no_reason_is_told() -> None:
    rows = [row(step) for step in range(1, 20)]
    rows[4] |= {"loss": float("nan"), "trouble": "the loss is nan"}
    rows[6] |= {"loss": float("nan"), "applied": False}
    for bad in rows[9:12]:
        bad["loss"] = None
    live, end = review([{"step": 0, "knn_full": 20.0}, *rows])
    assert not any("finite" in line for line in live)
    assert "the loss of 3 steps was not finite, the last is step 12" in end
