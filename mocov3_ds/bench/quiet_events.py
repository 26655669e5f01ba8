"""Losses and gradients of quiet runs, and spikes of one step: what the detectors of events say.

`python -m mocov3_ds.bench verdicts --events` prints the tables.

A quiet loss falls from 6.6 to 3, its noise falls with it, from 1.2 to 0.3 %. Gradients of layers
shrink by half; their logarithms have noise, half of whose variance all layers share, as they share
the batch: 0.25, as runs of batch 256 on CIFAR-10 have (0.18 to 0.40), and for power 0.1, too, as
larger batches have less. Noise is Gaussian, heavy-tailed, skewed as a largest value is, or
remembers its past.

Shape suffixes: T = steps, G = layers.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mocov3_ds.stability.calibrate import autoregressive
from mocov3_ds.stability.events import HISTORY, WINDOW, gradient_bursts, loss_jumps
from mocov3_ds.stability.findings import Array
from mocov3_ds.stability.trailing import window_length

LOSS_NOISE = 0.003
"""relative noise of a loss at the end of a run; four times that at its beginning"""
GRADIENT_NOISE, LITTLE_NOISE = 0.25, 0.1
"""standard deviations of the logarithm of a gradient"""
LENGTHS = (1000, 10_000, 100_000)
LOSS_LENGTHS = (64, 121, 400, *LENGTHS)
"""steps of runs, also of those in miniature, which are short"""
LAYERS = (4, 26)
RISES = (1.05, 1.2, 2.0)
"""what the loss of one step is multiplied with"""
FACTORS = (2.0, 5.0, 10.0)
"""what the gradient of one layer is multiplied with in one step"""
_Draw = Callable[[int, np.random.Generator], Array]

LOSS_NOISES: Mapping[str, _Draw] = {
    "Gaussian": lambda count, random: random.standard_normal(count),
    "t3": lambda count, random: random.standard_t(3, count) / 3**0.5,
    "AR 0.5": autoregressive(0.5),
    "AR 0.9": autoregressive(0.9),
}
"""name -> how noise of standard deviation 1 is drawn"""
GRADIENT_NOISES: Mapping[str, _Draw] = {
    "log-normal": LOSS_NOISES["Gaussian"],
    "log t4": lambda count, random: random.standard_t(4, count) / 2**0.5,
    "skewed": lambda count, random: random.gumbel(size=count) * 6**0.5 / np.pi,
    "AR 0.9": autoregressive(0.9),
}


def quiet_loss(steps: int, noise: str, random: np.random.Generator) -> Array:
    """A loss that falls with noise that falls, and nothing else, (T,)."""
    fallen_T = np.exp(-np.arange(1, steps + 1) / (0.2 * steps))
    relative_T = LOSS_NOISE * (1 + 3 * fallen_T) * LOSS_NOISES[noise](steps, random)
    loss_T: Array = (3 + 3.6 * fallen_T) * np.exp(relative_T)
    return loss_T


def quiet_gradients(
    layers: int,
    steps: int,
    noise: str,
    random: np.random.Generator,
    deviation: float = GRADIENT_NOISE,
) -> Array:
    """Largest gradients of layers that shrink to a half with noise, and nothing else, (G, T)."""
    shared_T = GRADIENT_NOISES[noise](steps, random)
    own_GT = np.stack([GRADIENT_NOISES[noise](steps, random) for _ in range(layers)])
    trend_T = np.log(0.5) * np.arange(steps) / steps
    grad_GT: Array = np.exp(trend_T + deviation * (shared_T + own_GT) / 2**0.5)
    return grad_GT


def loss_alarms(steps: int, noise: str, runs: int) -> int:
    """Quiet runs whose loss has an event."""
    random = np.random.default_rng([steps, [*LOSS_NOISES].index(noise)])
    at_T = np.arange(1, steps + 1)
    return sum(bool(loss_jumps(at_T, quiet_loss(steps, noise, random))) for _ in range(runs))


def gradient_alarms(layers: int, steps: int, noise: str, runs: int) -> int:
    """Quiet runs with a gradient event in any layer."""
    random = np.random.default_rng([layers, steps, [*GRADIENT_NOISES].index(noise)])
    at_T, window = np.arange(1, steps + 1), window_length(steps, WINDOW)
    return sum(
        any(gradient_bursts(at_T, quiet_gradients(layers, steps, noise, random), window))
        for _ in range(runs)
    )


def loss_power(steps: int, noise: str, rise: float, runs: int) -> float:
    """Share of losses of one step, so many times as high as they would be, that are an event."""
    random = np.random.default_rng([steps, [*LOSS_NOISES].index(noise), round(100 * rise)])
    at_T, found = np.arange(1, steps + 1), 0
    for _ in range(runs):
        loss_T = quiet_loss(steps, noise, random)
        step = int(random.integers(max(steps // 10, HISTORY + 1), steps))
        loss_T[step - 1] *= rise
        found += any(jump.first <= step <= jump.last for jump in loss_jumps(at_T, loss_T))
    return found / runs


def gradient_power(
    layers: int,
    steps: int,
    noise: str,
    factor: float,
    runs: int,
    deviation: float = GRADIENT_NOISE,
) -> float:
    """Share of gradients of one layer in one step, so many times as large, that are an event."""
    random = np.random.default_rng([layers, steps, [*GRADIENT_NOISES].index(noise), round(factor)])
    at_T, window, found = np.arange(1, steps + 1), window_length(steps, WINDOW), 0
    for _ in range(runs):
        grad_GT = quiet_gradients(layers, steps, noise, random, deviation)
        step, layer = int(random.integers(steps // 10, steps)), int(random.integers(layers))
        grad_GT[layer, step - 1] *= factor
        bursts = gradient_bursts(at_T, grad_GT, window)[layer]
        found += any(burst.first <= step <= burst.last for burst in bursts)
    return found / runs


def print_events(runs: int) -> None:
    """Print both tables for BENCHMARKS.md.

    Args:
        runs: each spike is planted into half so many runs, and twice so many are quiet; of 100,000
            steps a fifth of these.
    """
    percent = [f"+{100 * rise - 100:.0f} %" for rise in RISES]
    print_header(["steps", "noise of the loss", "quiet runs with an event", *percent])
    for steps in LOSS_LENGTHS:
        quiet, planted = runs_of(runs, steps)
        for noise in LOSS_NOISES:
            alarms = f"{loss_alarms(steps, noise, quiet)} of {quiet}"
            power = [loss_power(steps, noise, rise, planted) for rise in RISES]
            print_row([f"{steps:,}", noise, alarms], power)
    print()
    kinds = [(factor, noise) for noise in (GRADIENT_NOISE, LITTLE_NOISE) for factor in FACTORS]
    times = [f"x {factor:.0f} at {noise}" for factor, noise in kinds]
    print_header(["layers", "steps", "noise of log gradients", "quiet runs with an event", *times])
    for layers in LAYERS:
        for steps in LENGTHS:
            quiet, planted = runs_of(runs, steps)
            for noise in GRADIENT_NOISES:
                alarms = f"{gradient_alarms(layers, steps, noise, quiet)} of {quiet}"
                power = [gradient_power(layers, steps, noise, f, planted, d) for f, d in kinds]
                print_row([f"{layers}", f"{steps:,}", noise, alarms], power)


def runs_of(runs: int, steps: int) -> tuple[int, int]:
    """Quiet runs and planted ones of a length, for so many runs asked for."""
    share = 5 if steps > 10_000 else 1
    return max(2 * runs // share, 1), max(runs // 2 // share, 1)


def print_header(names: Sequence[str]) -> None:
    """Print the head of a table."""
    print("|", " | ".join(names), "|")
    print("|" + "---|" * len(names))


def print_row(cells: Sequence[str], shares: Sequence[float]) -> None:
    """Print cells, and shares as percents."""
    print("|", " | ".join([*cells, *(f"{100 * share:.0f} %" for share in shares)]), "|", flush=True)
