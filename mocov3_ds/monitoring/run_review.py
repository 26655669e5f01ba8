"""What is wrong with a run, from the rows of its log: said when it happens, and at the end.

    bad and skipped steps      a step was dropped: not finite, a spike, or the fp16 loss scale
    loss not finite            in a row that tells no such reason
    early alarms               a rule of `alarms` struck
    loss at its chance level   it never left it, or came back: the network tells no keys apart
    collapse                   the queries lie close together on the sphere
    k-NN below the start's     the features are worse than those the run began with

`stability.verdict` judges finished runs with more care and more numbers; this needs one row after
the other, and costs nothing.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from mocov3_ds.settings.wording import count_noun

LEFT_CHANCE = 0.95
"""share of the chance level below which a loss has left it"""
AT_CHANCE = 0.98
"""share of the chance level above which a loss has come back to it"""
AT_CHANCE_FOR = 0.01
"""for this share of the run"""
AT_LEAST = 5
"""steps, in a short run"""
COLLAPSED = 0.1
"""spread of the queries over that of an even distribution on the sphere"""
_FIRST_LOOK = 0.1  # share of the run after which loss and k-NN accuracy are expected to have moved
_RECENT = 5  # steps whose mean loss is looked at
_QUIET_STEPS = 20  # a new alarm is said only after so many steps without one

Row = Mapping[str, Any]


class RunReview:
    """Looks at the rows of a run in their order, those of earlier attempts as well.

    Args:
        total_steps: Number of steps of the complete run.
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._steps = 0
        self._skipped, self._bad, self._alarms = 0, 0, 0
        self._not_finite: list[int] = []
        self._quiet_until = 0
        self._loss = _LossReview(total_steps)
        self._collapsed_since: int | None = None
        self._knn = _KnnReview()

    def push(self, row: Row) -> list[str]:
        """Take in the next row, and return what is to be said of it: no line for most rows.

        Args:
            row: Values of a step as `metrics.jsonl` has them.
        """
        self._steps = row["step"]
        return [
            *self._look_at_step(row),
            *self._look_at_alarms(row),
            *self._loss.push(row),
            *self._look_at_spread(row),
            *self._knn.push(row, is_early=self._steps < _FIRST_LOOK * self._total_steps),
        ]

    def summarise(self) -> list[str]:
        """Return what is to be said at the end; no line for a run without trouble."""
        lines = [*self._loss.summarise()]
        if self._collapsed_since is not None:
            lines.append(f"collapsed since step {self._collapsed_since}: the queries lie together")
        lines += self._knn.summarise()
        if self._skipped:
            lines.append(f"fp16: {count_noun(self._skipped, 'step')} skipped by an overflow")
        if self._bad:
            lines.append(f"{count_noun(self._bad, 'bad step')} dropped, see trouble/")
        if self._not_finite:
            lines.append(
                f"the loss of {count_noun(len(self._not_finite), 'step')} was not finite, the last "
                f"is step {self._not_finite[-1]}"
            )
        if self._alarms:
            lines.append(f"early alarms in {count_noun(self._alarms, 'step')}, see alarms/")
        return lines

    def _look_at_step(self, row: Row) -> Iterator[str]:
        if row.get("trouble"):
            self._bad += 1  # `faults.bad_step_policy` says more of it
        elif row.get("applied") is False:
            self._skipped += 1
            if self._skipped & (self._skipped - 1) == 0:  # 1, 2, 4, 8, ...
                scale = _number(row, "loss_scale")
                scale_text = "" if math.isnan(scale) else f"; loss scale {scale:g}"
                yield (
                    f"step {self._steps}: the fp16 gradient overflowed, the step is skipped "
                    f"({self._skipped} of {self._steps} so far{scale_text})"
                )
        elif {"loss", "lr"} & row.keys() and not math.isfinite(_number(row, "loss")):
            self._not_finite.append(self._steps)

    def _look_at_alarms(self, row: Row) -> Iterator[str]:
        alarms = row.get("alarms")
        if alarms and isinstance(alarms, list):
            self._alarms += 1
            if self._steps > self._quiet_until:
                names = ", ".join(map(str, alarms))
                response = f"; response: {row['response']}" if row.get("response") else ""
                yield (
                    f"step {self._steps}: early alarm ({names}), see alarms/step-"
                    f"{self._steps:08d}.json{response}"
                )
            self._quiet_until = self._steps + _QUIET_STEPS

    def _look_at_spread(self, row: Row) -> Iterator[str]:
        spread = _number(row, "spread")
        if spread >= COLLAPSED:
            self._collapsed_since = None
        elif spread < COLLAPSED and self._collapsed_since is None:
            self._collapsed_since = self._steps
            yield (
                f"step {self._steps}: collapse, the queries of all images lie close together "
                f"(spread {spread:.2g}, 1 = even on the sphere)"
            )


def _number(row: Row, name: str) -> float:
    """Return a value of a row, NaN where the row has no such number."""
    value = row.get(name)
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # of a row that was not written here
        return math.nan


class _LossReview:
    """Whether the loss has left its chance level, and whether it came back."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._share, self._step, self._chance = math.nan, 0, math.nan
        self._has_left, self._back_since, self._says_back = False, 0, False
        self._next_look = max(math.ceil(_FIRST_LOOK * total_steps), _RECENT)

    def push(self, row: Row) -> Iterator[str]:
        loss, chance = _number(row, "loss"), _number(row, "chance_loss")
        if math.isnan(loss) or not 0 < chance < math.inf:
            return
        self._step, self._chance = row["step"], chance
        self._recent.append(loss / chance)
        self._share = sum(self._recent) / len(self._recent)
        if loss < LEFT_CHANCE * chance:
            self._has_left = True
        if not self._has_left:
            if self._step >= self._next_look and self._share > AT_CHANCE:
                self._next_look = 2 * self._step
                yield f"step {self._step}: {self._describe_stay()}"
        elif loss <= AT_CHANCE * chance:
            self._back_since, self._says_back = 0, False
        else:
            self._back_since = self._back_since or self._step
            longest = max(AT_CHANCE_FOR * self._total_steps, AT_LEAST)
            if not self._says_back and self._step - self._back_since + 1 >= longest:
                self._says_back = True
                yield f"step {self._step}: {self._describe_return()}"

    def _describe_stay(self) -> str:
        return (
            f"the loss has not left its chance level ({self._share * self._chance:.4g} of "
            f"{self._chance:.4g}), so nothing is learned yet"
        )

    def _describe_return(self) -> str:
        return f"the loss is back at its chance level ({self._chance:.4g}) since {self._back_since}"

    def summarise(self) -> Iterator[str]:
        if self._says_back:
            yield self._describe_return()
        elif not self._has_left and self._step >= AT_LEAST and self._share > AT_CHANCE:
            yield self._describe_stay()


class _KnnReview:
    """Whether the features are worse than those that the run began with."""

    def __init__(self) -> None:
        self._start, self._probes = math.nan, 0.0
        self._is_below, self._final = False, math.nan

    def push(self, row: Row, *, is_early: bool) -> Iterator[str]:
        if row["step"] == 0 or "knn_probes" in row:  # an extended run begins at a later step
            self._start, self._probes = _number(row, "knn_full"), _number(row, "knn_probes")
            return
        if "knn_full" in row:
            self._final = _number(row, "knn_full")
        accuracy = _number(row, "knn_full" if "knn_full" in row else "knn")
        if is_early or math.isnan(accuracy) or math.isnan(self._start):
            return
        is_below = accuracy < self._start - 2 * self._deviation()
        if is_below and not self._is_below:
            yield (
                f"step {row['step']}: k-NN accuracy {accuracy:.2f} % is below the "
                f"{self._start:.2f} % of the start"
            )
        self._is_below = is_below

    def _deviation(self) -> float:
        """Binomial error of the accuracy at the start, percent."""
        share = min(max(self._start / 100, 0.0), 1.0)
        probes = self._probes if self._probes >= 1 else 1.0
        return 100 * math.sqrt(share * (1 - share) / probes)

    def summarise(self) -> Iterator[str]:
        if self._final < self._start:
            yield (
                f"k-NN accuracy {self._final:.2f} % at the end, {self._start:.2f} % at the start"
            )
        elif self._is_below:
            yield f"k-NN accuracy is below the {self._start:.2f} % of the start"
