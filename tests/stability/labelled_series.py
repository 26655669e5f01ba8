"""Series of many kinds, healthy or with something planted in them.

Shape suffixes: T = steps, K = k-NN evaluations, G = layer groups.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from mocov3_ds.stability.findings import Series, Verdict

Array = npt.NDArray[np.float64]
Noise = Literal["gauss", "t3", "ar0.5", "ar0.9"]
GROUPS = ("patch_embed", "cls", "block_0", "block_1", "block_2", "norm", "projector", "predictor")
CHANCE_LOSS, CHANCE_KNN = 6.65, 10.0


@dataclass(frozen=True, kw_only=True)
class Fall:
    """A loss of accuracy, its times as shares of the run."""

    at: float
    depth: float
    """points, or a share of the level where `relative`"""
    relative: bool = False
    falls: float = 0.0
    stays: float = 0.0
    heals: float = 0.05
    """0 = it stays lost"""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A burst of gradients, up to `height` times, for `rows` steps, later in deeper layers."""

    at: float
    height: float = 20.0
    rows: int = 12
    lag: int = 0
    groups: tuple[str, ...] = GROUPS
    loss: float = 0.0
    """share by which the loss jumps 4 steps later"""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of series and its label."""

    label: Verdict
    steps: int = 4000
    evaluations: int = 200
    probes: int = 5000
    start: float = 20.0
    """accuracy of the random network"""
    end: float = 60.0
    curve: Literal["saturating", "linear", "flat", "steep"] = "saturating"
    excess: float = 0.4
    """points of noise beside the binomial error"""
    noise: Noise = "gauss"
    falls: tuple[Fall, ...] = ()
    spikes: tuple[Spike, ...] = ()
    loss_jumps: tuple[tuple[float, float, int], ...] = ()
    """(share of the run, size as a share of the loss, rows)"""
    loss_noise: float = 0.003
    loss_noise_kind: Noise = "gauss"
    grad_noise: float = 0.15
    grad_drift: float = 0.5
    """falls of the log of the gradients over the run"""
    change: Callable[[Series, np.random.Generator], Series] = lambda series, _: series


def make_series(kind: Kind, seed: int) -> Series:
    """One series of a kind."""
    random = np.random.default_rng([seed, *map(ord, repr(kind.label)), kind.steps])
    t = np.arange(1, kind.steps + 1)
    warm = max(kind.steps // 10, 1)
    half_turn = np.pi * (t - warm) / max(kind.steps - warm, 1)
    lr_T = 1e-3 * np.where(t < warm, t / warm, 0.5 * (1 + np.cos(half_turn)))
    steps_K = np.unique(
        np.linspace(0, kind.steps, kind.evaluations + 1).round()[1:].astype(np.int64)
    )
    true_K = _true_accuracy(kind, steps_K / kind.steps)
    knn_K = 100 * random.binomial(kind.probes, true_K / 100) / kind.probes
    knn_K = knn_K + kind.excess * draw_noise(kind.noise, len(steps_K), random)
    series = Series(
        steps_T=t,
        loss_T=_loss(kind, t, random),
        chance_loss=CHANCE_LOSS,
        lr_T=lr_T,
        groups=GROUPS,
        grad_linf_GT=_gradients(kind, t, random),
        rms_GT=0.8 * np.exp(0.1 * random.standard_normal((len(GROUPS), kind.steps))),
        knn_steps_K=steps_K,
        knn_K=np.clip(knn_K, 0, 100),
        probes=kind.probes,
        knn_chance=CHANCE_KNN,
        total_steps=kind.steps,
    )
    return kind.change(series, random)


def draw_noise(kind: Noise, count: int, random: np.random.Generator) -> Array:
    """Noise of standard deviation 1, (count,)."""
    if kind == "t3":
        return random.standard_t(3, count) / 3**0.5
    white = random.standard_normal(count)
    if kind == "gauss":
        return white
    memory = float(kind[2:])
    for i in range(1, count):
        white[i] = memory * white[i - 1] + (1 - memory**2) ** 0.5 * white[i]
    return white


def _true_accuracy(kind: Kind, u_K: Array) -> Array:
    rise = kind.end - kind.start
    shape = {
        "saturating": 1 - np.exp(-u_K / 0.25),
        "steep": 1 - np.exp(-u_K / 0.05),
        "linear": u_K,
        "flat": np.zeros_like(u_K),
    }[kind.curve]
    true_K = kind.start + rise * shape
    for fall in kind.falls:
        since_K = u_K - fall.at
        down_K = np.clip(since_K / fall.falls, 0, 1) if fall.falls else 1.0 * (since_K > 0)
        if fall.heals:
            healed_K = (since_K - fall.falls - fall.stays) / fall.heals
            down_K = down_K * np.clip(1 - healed_K, 0, 1)
        depth_K = fall.depth * (true_K if fall.relative else 1.0)
        true_K = true_K - depth_K * down_K
    return np.clip(true_K, 0.5, 99.5)


def _loss(kind: Kind, t: Array, random: np.random.Generator) -> Array:
    true_T = 3.0 + 3.6 * np.exp(-t / (0.2 * kind.steps))
    loss_T = true_T * (1 + kind.loss_noise * draw_noise(kind.loss_noise_kind, len(t), random))
    jumps = [(s.at + 4 / kind.steps, s.loss, s.rows) for s in kind.spikes if s.loss]
    for at, size, rows in (*kind.loss_jumps, *jumps):
        first = round(at * kind.steps)
        loss_T[first : first + rows] *= 1 + size
    return loss_T


def _gradients(kind: Kind, t: Array, random: np.random.Generator) -> Array:
    count = len(GROUPS), len(t)
    level_G = random.uniform(-8, -3, len(GROUPS))[:, None]
    log_GT = level_G + kind.grad_noise * random.standard_normal(count)
    log_GT += 0.3 * kind.grad_noise * random.standard_exponential(count)
    log_GT -= kind.grad_drift * t / len(t)
    for spike in kind.spikes:
        for row, group in enumerate(GROUPS):
            if group in spike.groups:
                first = round(spike.at * len(t)) + round(spike.lag * min(row, 4) / 4)
                span = np.arange(spike.rows)
                shape = 1 - np.abs(2 * span - spike.rows + 1) / (spike.rows + 1)
                stop = min(first + spike.rows, len(t))
                log_GT[row, first:stop] += (np.log(spike.height) * shape / shape.max())[
                    : stop - first
                ]
    grad_GT: Array = np.exp(log_GT)
    return grad_GT


# ------------------------------------------------------------------ changes of a finished series
def stop(series: Series, _: object, share: float, last_loss: float | None = None) -> Series:
    """The run ends early, its last loss perhaps not finite."""
    end = int(share * len(series.steps_T))
    there_K = series.knn_steps_K <= series.steps_T[end - 1]
    loss_T = series.loss_T[:end].copy()
    if last_loss is not None:
        loss_T[-1] = last_loss
    return replace(
        series,
        steps_T=series.steps_T[:end],
        loss_T=loss_T,
        lr_T=series.lr_T[:end],
        grad_linf_GT=series.grad_linf_GT[:, :end],
        rms_GT=series.rms_GT[:, :end],
        knn_steps_K=series.knn_steps_K[there_K],
        knn_K=series.knn_K[there_K],
    )


def pick_rows(series: Series, rows: Array, rows_K: Array | None = None) -> Series:
    if rows_K is None:
        rows_K = np.arange(len(series.knn_steps_K))
    return replace(
        series,
        steps_T=series.steps_T[rows],
        loss_T=series.loss_T[rows],
        lr_T=series.lr_T[rows],
        grad_linf_GT=series.grad_linf_GT[:, rows],
        rms_GT=series.rms_GT[:, rows],
        knn_steps_K=series.knn_steps_K[rows_K],
        knn_K=series.knn_K[rows_K],
    )


def resumed(series: Series, _: object) -> Series:
    """The log holds steps 55 % to 60 % twice: the run was killed and went on from a checkpoint."""
    n, k = len(series.steps_T), len(series.knn_steps_K)
    rows = np.r_[0 : int(0.6 * n), int(0.55 * n) : n]
    return pick_rows(series, rows, np.r_[0 : int(0.6 * k), int(0.55 * k) : k])


def every_row_twice(series: Series, _: object) -> Series:
    return pick_rows(
        series,
        np.repeat(np.arange(len(series.steps_T)), 2),
        np.repeat(np.arange(len(series.knn_K)), 2),
    )


def rows_missing(series: Series, random: np.random.Generator) -> Series:
    return pick_rows(series, np.flatnonzero(random.random(len(series.steps_T)) > 0.1))


def sparse_late(series: Series, _: object) -> Series:
    """Evaluated four times less often in the second half."""
    k = len(series.knn_steps_K)
    return pick_rows(series, np.arange(len(series.steps_T)), np.r_[0 : k // 2, k // 2 : k : 4])


def loss_at_chance(
    series: Series, random: np.random.Generator, first: float, last: float
) -> Series:
    loss_T, n = series.loss_T.copy(), len(series.loss_T)
    span = slice(int(first * n), int(last * n))
    loss_T[span] = CHANCE_LOSS * (1 + 0.001 * random.standard_normal(len(loss_T[span])))
    return replace(series, loss_T=loss_T)


def few_nan(series: Series, random: np.random.Generator) -> Series:
    loss_T = series.loss_T.copy()
    loss_T[random.choice(len(loss_T), 3, replace=False)] = np.nan
    return replace(series, loss_T=loss_T)


def many_loss_spikes(series: Series, random: np.random.Generator, share: float) -> Series:
    loss_T, n = series.loss_T.copy(), len(series.loss_T)
    loss_T[random.choice(np.arange(200, n), int(share * n), replace=False)] *= 1.5
    return replace(series, loss_T=loss_T)


def measured_every(series: Series, _: object, every: int) -> Series:
    grad_GT, rms_GT = series.grad_linf_GT.copy(), series.rms_GT.copy()
    between_T = series.steps_T % every != 0
    grad_GT[:, between_T] = rms_GT[:, between_T] = np.nan
    return replace(series, grad_linf_GT=grad_GT, rms_GT=rms_GT)


def no_gradients(series: Series, _: object) -> Series:
    empty = np.empty((0, len(series.steps_T)))
    return replace(series, groups=(), grad_linf_GT=empty, rms_GT=empty)


def knows(series: Series, _: object, **values: object) -> Series:
    return replace(series, **values)  # type: ignore[arg-type]


def frozen_first(series: Series, _: object) -> Series:
    grad_GT, rms_GT = series.grad_linf_GT.copy(), series.rms_GT.copy()
    grad_GT[0] = rms_GT[0] = np.nan
    return replace(series, grad_linf_GT=grad_GT, rms_GT=rms_GT)


def bad_learning(series: Series, random: np.random.Generator) -> Series:
    """A rate far too high: the loss stays near chance, accuracy near that of the random network."""
    loss_T = CHANCE_LOSS * (0.93 + 0.003 * random.standard_normal(len(series.loss_T)))
    return replace(series, loss_T=loss_T, knn_at_start=24.6, knn_at_end=23.1)
