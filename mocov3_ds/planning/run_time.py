"""How long does a whole run take: steps, the loader that feeds them, evaluations and saves?"""

from dataclasses import dataclass

from mocov3_ds.config.run_config import Config
from mocov3_ds.planning import architecture
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.options import PlannedRun
from mocov3_ds.planning.pace import DECODE_CPU_S, STORAGE_CPU_S, Pace
from mocov3_ds.planning.whole_matrices import count_moments
from mocov3_ds.recipes import find_recipe

_HOST_COPY = 12e9
"""bytes a second from a card to its machine's memory, which a save waits for: assumed"""


@dataclass(frozen=True, kw_only=True)
class RunTime:
    """Seconds of a whole run, part by part."""

    steps: int
    step_s: float
    """seconds of a step over whole sequences, by the cards"""
    shortest_step_s: float
    """seconds of a step when the sequences are shortest"""
    phases: tuple[tuple[float, float], ...] = ()
    """share of the steps and seconds of such a step, of a run that compresses its sequences"""
    loader_s: float
    """seconds in which the machines' cores read and decode a batch; 0 where they are not known"""
    knn_s: float
    """seconds of all k-NN evaluations"""
    save_s: float
    """seconds in which saves hold up the run"""
    spread: float
    """factor either way within which the cards' time is expected"""

    @property
    def loader_bound(self) -> bool:
        """Whether the cards wait for the loader at any time."""
        return self.loader_s > self.shortest_step_s

    @property
    def hours(self) -> float:
        """Hours of the run."""
        return self.hours_at(1.0)

    @property
    def low_hours(self) -> float:
        """Hours if the cards are as fast as may be expected."""
        return self.hours_at(1 / self.spread)

    @property
    def high_hours(self) -> float:
        """Hours if they are as slow."""
        return self.hours_at(self.spread)

    def hours_at(self, slowness: float) -> float:
        """Hours of the run.

        Args:
            slowness: the cards' time over what is computed.
        """
        step_s = sum(
            share * max(seconds * slowness, self.loader_s)
            for share, seconds in self.phases or ((1.0, self.step_s),)
        )
        return (self.steps * step_s + self.knn_s * slowness + self.save_s) / 3600


def plan_run_time(
    planned: PlannedRun, pace: Pace, cluster: Cluster, *, epochs: float, images: int, cores: int
) -> RunTime:
    """Time of a run.

    Args:
        planned: what is to be trained.
        pace: time of its step.
        cluster: machines that it runs on.
        epochs: length of the run.
        images: images of an epoch.
        cores: CPU cores of a machine; 0 = as many as the loader takes.

    Raises:
        ValueError: the set is smaller than a batch, so that an epoch has no step.
    """
    config = find_recipe(planned.recipe).config
    steps = count_steps(planned, epochs, images)
    loader_s = planned.batch * (DECODE_CPU_S + STORAGE_CPU_S)
    return RunTime(
        steps=steps,
        step_s=pace.step_s,
        shortest_step_s=pace.shortest_step_s,
        phases=tuple((phase.share, phase.step_s) for phase in pace.phases),
        loader_s=loader_s / (cores * cluster.nodes) if cores else 0.0,
        knn_s=_evaluations(config, steps) * _evaluation_s(config, planned, cluster),
        save_s=steps // config.save.every_steps * _copied_bytes(planned, cluster) / _HOST_COPY,
        spread=cluster.card.reach.spread,
    )


def count_steps(planned: PlannedRun, epochs: float, images: int) -> int:
    """Steps of a run, as training counts them.

    Args:
        planned: what is to be trained.
        epochs: length of the run.
        images: images of an epoch.

    Raises:
        ValueError: the set is smaller than a batch, so that an epoch has no step.
    """
    if images < planned.batch:
        raise ValueError(
            f"--images {images} are fewer than the global batch {planned.batch}: an epoch has no "
            "step; choose a smaller --batch."
        )
    return max(1, round(epochs * (images // planned.batch)))


def _evaluations(config: Config, steps: int) -> int:
    """Evaluations of the k-NN monitor, of both encoders where both are looked at."""
    every = config.knn.every_steps
    return steps // every * (1 + config.knn.momentum_encoder) if every else 0


def _evaluation_s(config: Config, planned: PlannedRun, cluster: Cluster) -> float:
    """Seconds of one: the probes' features on all cards; their neighbours are a thousandth of it.

    Args:
        config: the recipe's, whose k-NN monitor runs.
        planned: tells network and precision.
        cluster: the cards that share the probes.
    """
    card = cluster.card
    forward = architecture.forward_work(planned.shape)
    rate = card.peak_rate(planned.precision) * card.reach.products
    return config.knn.probes / cluster.cards * forward.operations / rate


def _copied_bytes(planned: PlannedRun, cluster: Cluster) -> float:
    """Bytes that the busiest rank copies: its share of masters and moments, and both encoders."""
    numbers = architecture.count_trained(planned.shape)
    numbers += count_moments(planned.optimizer, planned.shape, planned.optimizer_params)
    copies = architecture.count_momentum_weights(planned.shape)
    return 4 * (numbers / cluster.cards + copies)
