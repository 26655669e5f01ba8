"""What a run does for some steps after an alarm: nothing, an update clip, or half the rate.

`--alarm.response` chooses it (the clip is that of StableAdamW), `--alarm.steps` says for how many
steps it lasts. All ranks see the same alarms and so respond alike; the last step of a response is
part of each checkpoint.
"""

from mocov3_ds.config.parts import AlarmConfig
from mocov3_ds.optim.sharded import ShardedOptimizer


class AlarmResponse:
    """The response of one run to its alarms.

    Args:
        config: The settings `--alarm.*`.
        optimizer: The run's optimizer, whose update clip is switched on and off.
        active_until: Number of the last step of a response that a checkpoint tells of; 0 = none.
    """

    def __init__(
        self, config: AlarmConfig, optimizer: ShardedOptimizer, active_until: int = 0
    ) -> None:
        self._config, self._optimizer = config, optimizer
        self.active_until = active_until
        """number of the last step that the response lasts for"""

    def start(self, step: int) -> str:
        """Respond to an alarm, from the next step on.

        Args:
            step: Number of the step that raised the alarm, from 1.

        Returns:
            What the run does, as `--alarm.response` names it; empty for nothing.
        """
        if self._config.response == "none":
            return ""
        self.active_until = step + self._config.steps
        return self._config.response

    def switch_clip(self, steps_done: int) -> None:
        """Switch the optimizer's update clip on or off for the coming step.

        Args:
            steps_done: Number of optimizer steps done before the coming one.
        """
        if self._config.response == "clip":
            self._optimizer.set_update_clip(steps_done < self.active_until)

    def adjust_rate(self, steps_done: int, lr: float) -> float:
        """Return the learning rate of the coming step, halved while the response asks for it.

        Args:
            steps_done: Number of optimizer steps done before the coming one.
            lr: Learning rate that the schedule gives.
        """
        halved = self._config.response == "halve_lr" and steps_done < self.active_until
        return lr / 2 if halved else lr


def check_response(config: AlarmConfig, optimizer: ShardedOptimizer) -> None:
    """Check that the optimizer can do what `--alarm.response` asks for.

    Args:
        config: Settings `--alarm.*` of the run.
        optimizer: The optimizer that the run will use.

    Raises:
        ValueError: The response is `clip`, and the optimizer has no update clip or has it on
            all the time.
    """
    if config.response != "clip":
        return
    if not optimizer.accepts_update_clip:
        reason = optimizer.hints.get("update_clip", "it has no update clip")
        raise ValueError(
            f"--alarm.response clip does not go with {type(optimizer).__name__}: {reason}, or "
            "--alarm.response halve_lr."
        )
    if optimizer.update_clip:
        raise ValueError(
            "--alarm.response clip has no effect: the optimizer's update_clip is always on."
        )
