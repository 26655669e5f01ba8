"""Kinds of series, each with the verdict that the paper's words give it.

The labels follow arXiv 2104.02057, Sec. 4.1: a curve "reasonably smooth" is STABLE; "dips" are
UNSTABLE; "big dips", a partial restart, from a fifth of the accuracy on, are RESTARTED; a smooth
curve that "degrades gradually" is DEGRADING; spikes without a dip are TWITCHY. They were written
before the detectors were. Noise is Gaussian, heavy-tailed (Student's t with 3 degrees), or
remembers its past, as the accuracy by a queue does.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from tests.stability.labelled_series import (
    Fall,
    Kind,
    Spike,
    bad_learning,
    every_row_twice,
    few_nan,
    frozen_first,
    knows,
    loss_at_chance,
    many_loss_spikes,
    measured_every,
    no_gradients,
    pick_rows,
    resumed,
    rows_missing,
    sparse_late,
    stop,
)

DIP = Fall(at=0.5, depth=5, falls=0.01, stays=0.01, heals=0.05)
BURST = Spike(at=0.5)
PAPER: Mapping[str, Any] = {"steps": 31_200, "evaluations": 624}
TINY: Mapping[str, Any] = {"steps": 240, "evaluations": 60, "probes": 1000, "end": 30.0}

KINDS: Mapping[str, Kind] = {
    # ---- nothing happens
    "quiet": Kind(label="STABLE"),
    "quiet, 100 steps": Kind(label="STABLE", steps=100, evaluations=20),
    "quiet, tiny": Kind(label="STABLE", **TINY),
    "quiet, 50 evaluations": Kind(label="STABLE", steps=1000, evaluations=50, excess=0.56),
    "quiet, paper's length": Kind(label="STABLE", **PAPER, excess=0.56),
    "quiet, paper's length, remembers": Kind(label="STABLE", **PAPER, excess=0.56, noise="ar0.5"),
    "quiet, 1,560 evaluations": Kind(label="STABLE", steps=31_200, evaluations=1560, excess=0.56),
    "quiet, 50k probes": Kind(label="STABLE", evaluations=1000, probes=50_000),
    "quiet, 500 probes": Kind(label="STABLE", evaluations=500, probes=500),
    "quiet, long memory": Kind(label="STABLE", evaluations=200, excess=0.8, noise="ar0.9"),
    "quiet, long memory, 1,000": Kind(label="STABLE", evaluations=1000, excess=0.8, noise="ar0.9"),
    "quiet, heavy tails": Kind(label="STABLE", evaluations=400, excess=0.8, noise="t3"),
    "quiet, linear": Kind(label="STABLE", curve="linear"),
    "quiet, steep then level": Kind(label="STABLE", curve="steep", evaluations=500),
    "quiet, heavy-tailed loss": Kind(
        label="STABLE", steps=10_000, loss_noise=0.006, loss_noise_kind="t3"
    ),
    "quiet, heavy-tailed loss, short": Kind(
        label="STABLE", steps=400, evaluations=40, loss_noise=0.006, loss_noise_kind="t3"
    ),
    "quiet, noisy loss": Kind(label="STABLE", loss_noise=0.03),
    "quiet, noisy gradients": Kind(label="STABLE", steps=10_000, grad_noise=0.4),
    "quiet, gradients drift x100": Kind(label="STABLE", grad_drift=4.6),
    "quiet, rows missing": Kind(label="STABLE", change=rows_missing),
    "quiet, resumed": Kind(label="STABLE", change=resumed),
    "quiet, each row twice": Kind(label="STABLE", change=every_row_twice),
    "quiet, evaluated rarely later": Kind(label="STABLE", change=sparse_late),
    "quiet, measured every 5 steps": Kind(label="STABLE", change=partial(measured_every, every=5)),
    "quiet, frozen patch projection": Kind(label="STABLE", change=frozen_first),
    "quiet, no gradients logged": Kind(label="STABLE", change=no_gradients),
    "quiet, late start of the loss": Kind(
        label="STABLE", change=partial(loss_at_chance, first=0.0, last=0.1)
    ),
    "quiet, stopped half way": Kind(label="STABLE", change=partial(stop, share=0.5)),
    "warm-up falls from the random network": Kind(
        label="STABLE",
        start=28,
        falls=(Fall(at=0.01, depth=7, falls=0.02, stays=0.02, heals=0.06),),
    ),
    "warm-up falls, tiny": Kind(
        label="STABLE",
        **{**TINY, "start": 28.0, "end": 38.0},
        falls=(Fall(at=0.02, depth=7, falls=0.03, stays=0.03, heals=0.08),),
    ),
    "twin no better": Kind(label="STABLE", change=partial(knows, twin_knn=60.3)),
    "best of ten arms, by chance": Kind(
        label="STABLE", change=partial(knows, sibling="b", sibling_knn=60.2, siblings=10)
    ),
    "four below the best of six arms of one seed": Kind(
        label="STABLE", change=partial(knows, sibling="b", sibling_knn=63.5, siblings=6)
    ),
    "four below its twin, as seeds differ": Kind(
        label="STABLE", change=partial(knows, twin_knn=63.5, twin_bar=6.0)
    ),
    "ends far above the random network": Kind(
        label="STABLE", change=partial(knows, knn_at_start=20.0, knn_at_end=59.0)
    ),
    # ---- spikes alone
    "one burst": Kind(label="TWITCHY", spikes=(BURST,)),
    "burst with a loss jump": Kind(label="TWITCHY", spikes=(Spike(at=0.6, loss=0.1),)),
    "five bursts, lag 20": Kind(
        label="TWITCHY",
        steps=10_000,
        spikes=tuple(Spike(at=at, lag=20) for at in (0.2, 0.35, 0.5, 0.65, 0.8)),
    ),
    "one step x30 in all layers": Kind(label="TWITCHY", spikes=(Spike(at=0.5, height=30, rows=1),)),
    "one step x30 in all layers, noisy": Kind(
        label="TWITCHY", grad_noise=0.3, spikes=(Spike(at=0.5, height=30, rows=1),)
    ),
    "burst of the first layer alone": Kind(
        label="TWITCHY", spikes=(Spike(at=0.4, groups=("patch_embed",)),)
    ),
    "burst measured every 5 steps": Kind(
        label="TWITCHY",
        spikes=(Spike(at=0.5, rows=30),),
        change=partial(measured_every, every=5),
    ),
    "loss jump alone": Kind(label="TWITCHY", loss_jumps=((0.5, 0.1, 10),)),
    "loss jump of one step": Kind(label="TWITCHY", loss_jumps=((0.5, 0.2, 1),)),
    "loss jump, heavy tails": Kind(
        label="TWITCHY", loss_noise=0.004, loss_noise_kind="t3", loss_jumps=((0.5, 0.2, 10),)
    ),
    "burst, 100,000 steps": Kind(label="TWITCHY", steps=100_000, evaluations=500, spikes=(BURST,)),
    "burst in a run of 60 steps": Kind(
        label="TWITCHY", steps=60, evaluations=12, spikes=(Spike(at=0.6, rows=4, loss=0.3),)
    ),
    "three losses not finite": Kind(label="TWITCHY", change=few_nan),
    # ---- dips
    "dip of 5": Kind(label="UNSTABLE", falls=(DIP,)),
    "dip of 3, paper's length": Kind(
        label="UNSTABLE",
        **PAPER,
        falls=(Fall(at=0.6, depth=3, falls=0.005, stays=0.01, heals=0.03),),
    ),
    "dip of 2, 50k probes": Kind(
        label="UNSTABLE",
        **PAPER,
        probes=50_000,
        excess=0.3,
        falls=(Fall(at=0.6, depth=2, falls=0.005, stays=0.01, heals=0.03),),
    ),
    "dip of 5, 1,000 probes": Kind(
        label="UNSTABLE",
        probes=1000,
        falls=(Fall(at=0.6, depth=5, falls=0.01, stays=0.03, heals=0.05),),
    ),
    "dip of 10": Kind(label="UNSTABLE", end=70, falls=(replace(DIP, depth=10),)),
    "dip of 15 %": Kind(label="UNSTABLE", falls=(replace(DIP, depth=0.15, relative=True),)),
    "spikes with dips": Kind(
        label="UNSTABLE",
        steps=10_000,
        spikes=(Spike(at=0.4, loss=0.1), Spike(at=0.7, loss=0.1)),
        falls=(replace(DIP, at=0.4), replace(DIP, at=0.7)),
    ),
    "many dips": Kind(
        label="UNSTABLE",
        evaluations=400,
        falls=tuple(replace(DIP, at=at) for at in (0.3, 0.4, 0.5, 0.7, 0.8)),
    ),
    "dip that stays lost": Kind(label="UNSTABLE", falls=(replace(DIP, depth=6, heals=0.0),)),
    "dip, remembering noise": Kind(label="UNSTABLE", noise="ar0.5", falls=(replace(DIP, depth=6),)),
    "dip, 50 evaluations": Kind(
        label="UNSTABLE", evaluations=50, falls=(Fall(at=0.6, depth=6, stays=0.06, heals=0.06),)
    ),
    "dip on a linear rise": Kind(label="UNSTABLE", curve="linear", falls=(replace(DIP, depth=6),)),
    "dip, resumed": Kind(label="UNSTABLE", falls=(replace(DIP, at=0.7),), change=resumed),
    "many loss spikes": Kind(label="UNSTABLE", change=partial(many_loss_spikes, share=0.005)),
    # ---- restarts
    "restart of 45 %": Kind(
        label="RESTARTED", falls=(Fall(at=0.5, depth=0.45, relative=True, falls=0.005, heals=0.2),)
    ),
    "restart of 38 %": Kind(
        label="RESTARTED", falls=(Fall(at=0.4, depth=0.38, relative=True, falls=0.01, heals=0.15),)
    ),
    "restart of 25 %": Kind(
        label="RESTARTED",
        falls=(Fall(at=0.5, depth=0.26, relative=True, falls=0.005, stays=0.02, heals=0.1),),
    ),
    "restart of 45 %, 60 evaluations": Kind(
        label="RESTARTED",
        **{**TINY, "end": 50.0, "steps": 600},
        falls=(Fall(at=0.5, depth=0.45, relative=True, heals=0.04),),
    ),
    "restart, paper's length": Kind(
        label="RESTARTED",
        **PAPER,
        spikes=(Spike(at=0.6, loss=0.2),),
        falls=(Fall(at=0.6, depth=0.4, relative=True, falls=0.002, heals=0.08),),
    ),
    "restart near the end": Kind(
        label="RESTARTED", falls=(Fall(at=0.9, depth=0.4, relative=True, falls=0.005, heals=0.0),)
    ),
    # ---- declines
    "LAMB declines by 8": Kind(
        label="DEGRADING", falls=(Fall(at=0.4, depth=8, falls=0.4, heals=0.0),)
    ),
    "LAMB declines by 4": Kind(
        label="DEGRADING", falls=(Fall(at=0.4, depth=12, falls=0.5, heals=0.0),)
    ),
    "tiny, 3 of 25": Kind(
        label="DEGRADING",
        **{**TINY, "probes": 2000, "curve": "steep", "end": 26.0, "steps": 600},
        excess=0.2,
        falls=(Fall(at=0.3, depth=5, falls=0.5, heals=0.0),),
    ),
    "declines by 12 with a twitch": Kind(
        label="DEGRADING",
        falls=(Fall(at=0.45, depth=12, falls=0.3, heals=0.0),),
        spikes=(Spike(at=0.6, rows=4),),
    ),
    "declines by 12 with a loss jump": Kind(
        label="DEGRADING",
        falls=(Fall(at=0.45, depth=12, falls=0.3, heals=0.0),),
        loss_jumps=((0.55, 0.1, 4),),
    ),
    "declines and comes back": Kind(
        label="DEGRADING", falls=(Fall(at=0.4, depth=10, falls=0.2, stays=0.05, heals=0.2),)
    ),
    "declines, paper's length": Kind(
        label="DEGRADING", **PAPER, falls=(Fall(at=0.4, depth=10, falls=0.4, heals=0.0),)
    ),
    "declines, 50 evaluations": Kind(
        label="DEGRADING", evaluations=50, falls=(Fall(at=0.4, depth=10, falls=0.4, heals=0.0),)
    ),
    "declines, remembering noise": Kind(
        label="DEGRADING", noise="ar0.5", falls=(Fall(at=0.4, depth=10, falls=0.4, heals=0.0),)
    ),
    # ---- divergence
    "ends at NaN": Kind(label="DIVERGED", change=partial(stop, share=0.5, last_loss=np.nan)),
    "ends at infinity": Kind(label="DIVERGED", change=partial(stop, share=0.7, last_loss=np.inf)),
    "back at the chance level": Kind(
        label="DIVERGED", change=partial(loss_at_chance, first=0.6, last=1.0)
    ),
    "never leaves the chance level": Kind(
        label="DIVERGED",
        curve="flat",
        start=11,
        change=partial(loss_at_chance, first=0.0, last=1.0),
    ),
    "accuracy collapses": Kind(
        label="DIVERGED", falls=(Fall(at=0.6, depth=0.7, relative=True, falls=0.02, heals=0.0),)
    ),
    # ---- failures without a shape
    "learns nothing": Kind(
        label="NOT LEARNING",
        curve="flat",
        start=22,
        steps=240,
        evaluations=60,
        probes=2000,
        change=bad_learning,
    ),
    "ends where it began": Kind(
        label="NOT LEARNING",
        curve="flat",
        start=24,
        change=partial(knows, knn_at_start=24.5, knn_at_end=24.9),
    ),
    "guesses": Kind(label="NOT LEARNING", curve="flat", start=10.2),
    "five below its frozen twin": Kind(
        label="BELOW ITS TWIN", change=partial(knows, twin_knn=65.0)
    ),
    "four below another arm, as seeds tell": Kind(
        label="BELOW ITS TWIN",
        change=partial(knows, sibling="b", sibling_knn=63.5, siblings=6, sibling_bar=2.5),
    ),
    # ---- not looked
    "four evaluations, 24 steps": Kind(label="NOT LOOKED", steps=24, evaluations=4),
    "no evaluations, no gradients": Kind(
        label="NOT LOOKED",
        change=lambda series, random: no_gradients(
            pick_rows(series, np.arange(len(series.steps_T)), np.arange(0)), random
        ),
    ),
}
