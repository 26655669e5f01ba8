"""Series with planted events for the detectors to find, and healthy ones without any.

Shape suffixes: T = steps, K = k-NN evaluations.
"""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mocov3_ds.stability.findings import Series

GROUPS = ("patch_embed", "cls", "block_0", "block_1", "block_2", "norm", "projector", "predictor")
CHANCE = 6.65
PROBES = 5000
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Planted:
    """A series and the truth about it.

    Attributes:
        series: what the detectors see.
        spikes: peaks of the planted bursts of the patch projection.
        dips: first steps at which accuracy falls.
        lag: steps by which the last block's bursts come later.
    """

    series: Series
    spikes: list[int] = field(default_factory=list)
    dips: list[int] = field(default_factory=list)
    lag: int = 0


def healthy(seed: int, steps: int = 2000, every: int = 10, noise: float | None = None) -> Planted:
    """A falling loss, a rising accuracy, noisy gradients that shrink: nothing to report.

    Args:
        seed: of the noise.
        steps: length of the run.
        every: steps between k-NN evaluations.
        noise: of the loss, relative; None = 0.03 to 0.3 %.
    """
    random = np.random.default_rng(seed)
    t = np.arange(1, steps + 1)
    warm = steps // 10
    lr = np.where(t < warm, t / warm, 0.5 * (1 + np.cos(np.pi * (t - warm) / (steps - warm))))
    calm = random.uniform(0.002, 0.01)
    true = 3.0 + 3.6 * np.exp(-t / (0.2 * steps))
    loss = true + (calm if noise is None else noise * true) * random.standard_normal(steps)
    level = np.exp(random.uniform(-8, -3, len(GROUPS)))[:, None]
    # an L-inf norm of many values: log-normal with a heavy right side, slowly changing
    spread = random.uniform(0.05, 0.25)
    wander = np.cumsum(random.standard_normal((len(GROUPS), steps)), axis=1) * 0.3 / steps**0.5
    tail = 0.15 * random.exponential(size=(len(GROUPS), steps))
    noise_GT = spread * random.standard_normal((len(GROUPS), steps)) + tail + wander
    grad = level * np.exp(noise_GT - 0.5 * t / steps)
    rms = 0.8 * np.exp(0.1 * random.standard_normal((len(GROUPS), steps)))
    steps_K = np.arange(every, steps + 1, every)
    true_K = 45 - 30 * np.exp(-steps_K / (0.25 * steps))
    return Planted(
        Series(
            steps_T=t,
            loss_T=loss,
            chance_loss=CHANCE,
            lr_T=1e-3 * lr,
            groups=GROUPS,
            grad_linf_GT=grad,
            rms_GT=rms,
            knn_steps_K=steps_K,
            knn_K=_measured(true_K, random),
            probes=PROBES,
            knn_chance=10.0,
            total_steps=steps,
        )
    )


def _measured(true_K: Array, random: np.random.Generator) -> Array:
    """Accuracies with the binomial error of the probes."""
    return 100 * random.binomial(PROBES, true_K / 100) / PROBES


def burst(steps: int, peak: int, height: float, rise: int = 8, fall: int = 12) -> Array:
    """Factor on a gradient (T,): up to `height` over some steps, and down again."""
    t = np.arange(1, steps + 1)
    up = np.clip((t - peak + rise) / rise, 0, 1)
    down = np.clip((peak + fall - t) / fall, 0, 1)
    factor: Array = height ** (up * down)
    return factor


def with_spikes(seed: int, lag: int = 0, count: int = 6) -> Planted:
    """Bursts of all gradients, the deeper layers later, each with a jump of the loss 4 steps on.

    The RMS of the patch projection rises with its gradient out of a valley, as it does when the
    second moment has decayed.
    """
    plain = healthy(seed).series
    random = np.random.default_rng([seed, 1])
    steps = plain.total_steps
    peaks = np.linspace(400, steps - 200, count).astype(int) + random.integers(-30, 31, count)
    grad, rms, loss = plain.grad_linf_GT.copy(), plain.rms_GT.copy(), plain.loss_T.copy()
    for peak in peaks:
        height = random.uniform(8, 40)
        for row in range(len(GROUPS)):
            delay = round(lag * min(row, 4) / 4)
            grad[row] *= burst(steps, peak + delay, height)
            rms[row] *= burst(steps, peak + delay, 4.0)
        loss *= 1 + random.uniform(0.04, 0.15) * (burst(steps, peak + 4, 2.0, 6, 10) - 1)
    rms *= 0.2 / 0.8
    series = replace(plain, grad_linf_GT=grad, rms_GT=rms, loss_T=loss)
    return Planted(series, spikes=[int(p) for p in peaks], lag=lag)


def measured_every(series: Series, every: int) -> Series:
    """The same run with `--signals.every`: gradients and RMS are NaN in the steps between."""
    grad, rms = series.grad_linf_GT.copy(), series.rms_GT.copy()
    between = series.steps_T % every != 0
    grad[:, between] = rms[:, between] = np.nan
    return replace(series, grad_linf_GT=grad, rms_GT=rms)


def with_dips(seed: int, count: int = 2) -> Planted:
    """Spikes, each with a dip of the accuracy of 3 to 6 points that heals within 100 to 200."""
    spiky = with_spikes(seed, count=count)
    random = np.random.default_rng([seed, 2])
    series = spiky.series
    knn = series.knn_K.copy()
    for peak in spiky.spikes:
        depth, width = random.uniform(3, 6), random.integers(100, 201)
        since = series.knn_steps_K - peak
        knn -= np.where((since > 0) & (since < width), depth * (1 - since / width), 0)
    return replace(spiky, series=replace(series, knn_K=knn), dips=spiky.spikes)


def with_decline(seed: int) -> Planted:
    """LAMB's failure: accuracy slides by 4 to 8 points over half the run, nothing else shows."""
    series = healthy(seed).series
    random = np.random.default_rng([seed, 3])
    begin = random.uniform(0.3, 0.4) * series.total_steps
    slide = np.clip((series.knn_steps_K - begin) / (0.5 * series.total_steps), 0, 1)
    top = np.interp(begin, series.knn_steps_K, 45 - 30 * np.exp(-series.knn_steps_K / 500))
    true_K = np.minimum(45 - 30 * np.exp(-series.knn_steps_K / 500), top)
    knn = _measured(true_K - random.uniform(4, 8) * slide, random)
    return Planted(replace(series, knn_K=knn))


def with_restart(seed: int) -> Planted:
    """Accuracy falls to a half in two evaluations and takes a fifth of the run to come back."""
    series = with_spikes(seed, count=3).series
    random = np.random.default_rng([seed, 4])
    at = random.integers(900, 1300)
    since = (series.knn_steps_K - at) / 400
    lost = np.where((since > 0) & (since < 1), random.uniform(0.4, 0.6) * (1 - since), 0)
    return Planted(replace(series, knn_K=series.knn_K * (1 - lost)), dips=[int(at)])


def with_nan(seed: int) -> Planted:
    """The loss is not finite at some step, where the run ends."""
    series = healthy(seed).series
    end = int(np.random.default_rng([seed, 5]).integers(600, 1800))
    loss = series.loss_T[:end].copy()
    loss[-1] = np.nan
    there = series.knn_steps_K < end
    return Planted(
        replace(
            series,
            steps_T=series.steps_T[:end],
            loss_T=loss,
            lr_T=series.lr_T[:end],
            grad_linf_GT=series.grad_linf_GT[:, :end],
            rms_GT=series.rms_GT[:, :end],
            knn_steps_K=series.knn_steps_K[there],
            knn_K=series.knn_K[there],
        )
    )
