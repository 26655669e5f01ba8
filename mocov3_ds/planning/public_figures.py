"""Published speeds of Vision Transformers, and what the planner's rules say of each.

    figure.predict(products, elementwise)      images a second, to be held against figure.published

Each figure names what was run: networks, passes and tokens follow from it. Programs of 2022 and
before write their attention scores to memory; `SCORE_PASSES` says how often. Figures of a group
share one reach. Some of most groups are kept out of the fit.

Three kinds are listed and fitted apart from what a plan rests on: inference, whole recipes of 2021
on V100 and CLIP on hundreds of cards, whose loaders, networks and text towers are in the figure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add

from mocov3_ds.planning.architecture import ATTENTION_BACKWARD, Work
from mocov3_ds.planning.cards import PRESETS

SCORE_PASSES = 28.0
"""times that attention which is not fused moves its bf16 scores in a training step: fitted"""
_FORWARD_MOVED, _BACKWARD_MOVED = 18, 35
"""numbers a token and feature, as `architecture.step_work` counts them"""


@dataclass(frozen=True)
class Tower:
    """A stack of transformer blocks over a number of tokens."""

    dim: int
    depth: int
    heads: int
    mlp: float = 4.0
    """width of the hidden layer of a block, in widths"""


TINY, SMALL, BASE = Tower(192, 12, 3), Tower(384, 12, 6), Tower(768, 12, 12)
LARGE, HUGE, GIANT = Tower(1024, 24, 16), Tower(1280, 32, 16), Tower(1408, 40, 16, 6144 / 1408)
TEXT_BASE, TEXT_LARGE, MAE_DECODER = Tower(512, 12, 8), Tower(768, 12, 12), Tower(512, 8, 16)


@dataclass(frozen=True)
class Pass:
    """Passes of an image, or a part of it, through a tower."""

    tower: Tower
    tokens: int
    count: int = 1
    """how many of them an image has"""
    forwards: int = 1
    """forward passes of each"""
    backwards: int = 1
    """backward passes of each, 0 or 1"""
    patch: int = 0
    """pixels of the side of a patch, if the tower begins with patches"""

    def work(self) -> Work:
        """Operations and bytes of these passes for one image."""
        tower, tokens = self.tower, self.tokens
        linear = 2.0 * tokens * (4 + 2 * tower.mlp) * tower.dim**2 * tower.depth
        linear += 2.0 * tokens * 3 * self.patch**2 * tower.dim
        attention = 4.0 * tokens**2 * tower.dim * tower.depth
        row = 2.0 * tokens * tower.dim * tower.depth
        forward = Work(linear, attention, _FORWARD_MOVED * row)
        back = Work(2 * linear, ATTENTION_BACKWARD * attention, _BACKWARD_MOVED * row)
        return (forward * self.forwards + back * self.backwards) * self.count

    def score_bytes(self) -> float:
        """Bytes of all attention scores of one image, once, in bf16."""
        return 2.0 * self.tokens**2 * self.tower.heads * self.tower.depth * self.count


@dataclass(frozen=True)
class Figure:
    """A published speed."""

    name: str
    card: str
    """name of a preset"""
    published: float
    """images a second of one card"""
    group: str
    """figures with one reach"""
    source: str
    passes: Sequence[Pass] = field(repr=False)
    kept_out: bool = False
    """whether the fit does not see it"""
    fused: bool = True
    """whether attention keeps no scores"""
    compiled: bool = False
    """whether element-wise kernels were fused by a compiler"""

    def seconds(self) -> tuple[float, float, float]:
        """Seconds of an image at the peaks: matrix products, element-wise bytes, score bytes."""
        card = PRESETS[self.card]
        work = reduce(add, (one_pass.work() for one_pass in self.passes))
        scores = 0.0 if self.fused else sum(p.score_bytes() for p in self.passes)
        moved = (work.moved / card.bandwidth, scores / card.bandwidth)
        return work.operations / card.low_precision_rate, *moved

    def predict(self, products: float, elementwise: float) -> float:
        """Images a second of a card.

        Args:
            products: share of the peak rate that matrix products reach.
            elementwise: share of the bandwidth that element-wise kernels reach.
        """
        multiplied, moved, scores = self.seconds()
        return 1 / (multiplied / products + moved / elementwise + SCORE_PASSES * scores)

    def reach_of_products(self, elementwise: float) -> float:
        """The share of the peak with which `predict` gives what was published.

        Infinite where the bytes alone would take longer.
        """
        multiplied, moved, scores = self.seconds()
        seconds = 1 / self.published - moved / elementwise - SCORE_PASSES * scores
        return multiplied / seconds if seconds > 0 else math.inf


def fit_products(figures: Sequence[Figure], elementwise: float) -> float:
    """Geometric mean of what the figures that are not kept out reached."""
    reaches = [f.reach_of_products(elementwise) for f in figures if not f.kept_out]
    return math.exp(sum(map(math.log, reaches)) / len(reaches))


def fit_elementwise(figures: Sequence[Figure], shares: Sequence[float]) -> float:
    """The share of `shares` with which the reaches of a group's fitted figures differ least."""

    def disagreement(share: float) -> float:
        products = fit_products(figures, share)
        if products == math.inf:
            return math.inf
        errors = [f.predict(products, share) / f.published for f in figures if not f.kept_out]
        return sum(math.log(error) ** 2 for error in errors)

    return min(shares, key=disagreement)


def _tokens(side: int, patch: int) -> int:
    return (side // patch) ** 2 + 1


def _vit(tower: Tower, patch: int, side: int = 224, **passes: int) -> Pass:
    return Pass(tower, _tokens(side, patch), patch=patch, **passes)


def _timm(
    name: str, tower: Tower, patch: int, speed: float, *, side: int = 224, kept_out: bool = True
) -> Figure:
    table = "timm, benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv"
    passes = [_vit(tower, patch, side)]
    group = "RTX 3090, training"
    return Figure(name, "RTX3090", speed, group, table, passes, kept_out, fused=False)


def _inference(name: str, tower: Tower, patch: int, card: str, speed: float) -> Figure:
    version = {"RTX3090": "pt240", "RTX4090": "pt291"}[card]
    source = f"timm, benchmark-infer-amp-nhwc-{version}, {card}"
    passes = [_vit(tower, patch, backwards=0)]
    return Figure(name, card, speed, f"{card}, inference", source, passes, tower in (BASE, HUGE))


def _dino(tower: Tower, patch: int, small: int, count: int) -> list[Pass]:
    """Two large views for student and teacher, `count` small ones for the student."""
    views = [_vit(tower, patch, count=2, forwards=2)]
    return views + ([_vit(tower, patch, small, count=count)] if count else [])


def _clip(tower: Tower, patch: int, text: Tower) -> list[Pass]:
    return [_vit(tower, patch), Pass(text, 77)]


_NEMO = "NVIDIA NeMo user guide, ViT performance"
_V100, _CLIPS = "V100, whole recipes of 2021", "A100, CLIP on hundreds of cards, 2022"
_LAION = "LAION, scaling-laws-openclip, table of runs"
_DINOV3 = "DINOv3 README, 125k steps of 2048 in 14 h on 32 cards"

FIGURES: tuple[Figure, ...] = (
    _timm("ViT-S/16", SMALL, 16, 1052.9, kept_out=False),
    _timm("ViT-B/16", BASE, 16, 390.9, kept_out=False),
    _timm("ViT-B/16, 384 px", BASE, 16, 97.0, side=384, kept_out=False),
    _timm("ViT-L/16", LARGE, 16, 117.1, kept_out=False),
    _timm("ViT-Ti/16", TINY, 16, 2293.5),
    _timm("ViT-S/16, 384 px", SMALL, 16, 239.1, side=384),
    _timm("ViT-B/32", BASE, 32, 1703.6),
    _timm("ViT-B/8", BASE, 8, 63.4),
    _timm("ViT-L/32", LARGE, 32, 521.7),
    _timm("ViT-L/14", LARGE, 14, 85.3),
    _timm("ViT-L/16, 384 px", LARGE, 16, 29.1, side=384),
    _timm("ViT-H/14", HUGE, 14, 39.9),
    _timm("ViT-g/14", GIANT, 14, 22.3),
    Figure("ViT-g/14, 8 cards", "A100-80GB", 86.6, "A100, training", _NEMO, [_vit(GIANT, 14)]),
    Figure("DINOv2 ViT-L/16, 32 cards", "A100-80GB", 92.6, "A100, training",
           "DINOv2 README, 125k steps of 2048 in 1 day", _dino(LARGE, 16, 96, 8)),
    Figure("ViT-g/14, 128 cards", "A100-80GB", 83.2, "A100, training", _NEMO, [_vit(GIANT, 14)],
           kept_out=True),
    Figure("DINOv2 ViT-L/14, 96 cards", "A100-80GB", 70.1, "A100, training",
           "DINOv2 README, 3.3 days", _dino(LARGE, 14, 98, 8), kept_out=True),
    Figure("ViT-g/14, 8 cards", "H100-80GB", 178.5, "H100, training", _NEMO, [_vit(GIANT, 14)]),
    Figure("ViT-g/14, 128 cards", "H100-80GB", 168.4, "H100, training", _NEMO, [_vit(GIANT, 14)],
           kept_out=True),
    Figure("DINOv3 ViT-L/16, 32 cards", "H100-80GB", 158.7, "H100, training", _DINOV3,
           _dino(LARGE, 16, 96, 8), kept_out=True),
    Figure("ViT-5-S/16", "H100-80GB", 2305.0, "H100, training", "nvSubquadratic benchmarks, eager",
           [_vit(SMALL, 16)], kept_out=True),
    Figure("ViT-5-S/16, compiled", "H100-80GB", 7716.0, "H100, compiled",
           "nvSubquadratic benchmarks, torch.compile", [_vit(SMALL, 16)], compiled=True),
    _inference("ViT-S/16", SMALL, 16, "RTX3090", 4584.9),
    _inference("ViT-B/16", BASE, 16, "RTX3090", 1570.7),
    _inference("ViT-L/16", LARGE, 16, "RTX3090", 486.7),
    _inference("ViT-H/14", HUGE, 14, "RTX3090", 183.9),
    _inference("ViT-S/16", SMALL, 16, "RTX4090", 8214.7),
    _inference("ViT-B/16", BASE, 16, "RTX4090", 2992.8),
    _inference("ViT-L/16", LARGE, 16, "RTX4090", 954.1),
    _inference("ViT-H/14", HUGE, 14, "RTX4090", 370.8),
    Figure("BEiT-B, 500k steps of 2048, 16 cards, 5 days", "V100-32GB", 144.7, _V100,
           "BEiT paper, Sec. 2.5", [_vit(BASE, 16)]),
    Figure("DINO ViT-S, 2 x 224 px, 16 cards", "V100-32GB", 145.4, _V100, "DINO paper, Table 8",
           _dino(SMALL, 16, 96, 0)),
    Figure("DINO ViT-S, 2 x 224 + 10 x 96 px, 16 cards", "V100-32GB", 91.9, _V100,
           "DINO paper, Table 8", _dino(SMALL, 16, 96, 10), kept_out=True),
    Figure("MAE ViT-L, 800 epochs, 64 cards, 42 h", "V100-32GB", 105.9, _V100, "MAE PRETRAIN.md",
           [Pass(LARGE, 50, patch=16), Pass(MAE_DECODER, 197)], kept_out=True),
    Figure("DeiT-B, 300 epochs, 8 cards, 53 h", "V100-32GB", 251.8, _V100, "DeiT paper, Sec. 6",
           [_vit(BASE, 16)], kept_out=True),
    Figure("DeiT-B, 300 epochs, 16 cards, 37 h", "V100-32GB", 180.3, _V100, "DeiT paper, Sec. 6",
           [_vit(BASE, 16)], kept_out=True),
    Figure("MoCo v3 ViT-B, 100 epochs, 128 cards, 24 h", "V100-32GB", 11.6, _V100,
           "arXiv 2104.02057, Sec. 5 (cards not named there)", _dino(BASE, 16, 96, 0),
           kept_out=True),
    Figure("OpenCLIP ViT-B/16, 176 cards", "A100-40GB", 310.1, _CLIPS, _LAION,
           _clip(BASE, 16, TEXT_BASE)),
    Figure("OpenCLIP ViT-L/14, 1024 cards", "A100-40GB", 77.3, _CLIPS, _LAION,
           _clip(LARGE, 14, TEXT_LARGE)),
    Figure("OpenCLIP ViT-B/16, 344 cards", "A100-40GB", 390.2, _CLIPS, _LAION,
           _clip(BASE, 16, TEXT_BASE), kept_out=True),
    Figure("OpenCLIP ViT-L/14, 768 cards", "A100-40GB", 78.6, _CLIPS, _LAION,
           _clip(LARGE, 14, TEXT_LARGE), kept_out=True),
)  # fmt: skip
