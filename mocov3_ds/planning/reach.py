"""What share of its peaks does a card reach on a ViT, how far may that be off, and what says so?

Nothing was measured here, where there is no GPU. The shares are fitted to published speeds of ViTs
(`public_figures`), some of which are kept out of the fit to see how good it is;
`python -m mocov3_ds.bench reach` fits them again and prints every figure beside its prediction.

Three numbers describe a kind of card. Matrix products reach `products` of the peak rate. Norms,
GELU and residuals move their bytes at `elementwise` of the bandwidth: a network of half the width
has as many of them for half the products, which is what makes small ones slow. `spread` is the
factor either way within which the time of a step is expected.
"""

from dataclasses import dataclass

STREAM = 0.8
"""share of the bandwidth that long contiguous streams reach (optimizer, momentum): assumed"""
EAGER, COMPILED = 0.33, 0.53
"""share of the bandwidth of element-wise kernels, one by one and fused by torch.compile: fitted"""
FITTED, LOOSE, UNKNOWN = 1.35, 2.2, 2.0
"""spreads: of cards with published ViT speeds; of old ones, whose figures are whole recipes; of
cards without any"""


@dataclass(frozen=True)
class Reach:
    """What a kind of card reaches of its peaks."""

    products: float
    """share of the peak rate that matrix products reach, 0 to 1"""
    source: str
    """what the share rests on"""
    spread: float = UNKNOWN
    """the time of a step is expected between 1 / spread and spread of what is computed"""
    elementwise: float = EAGER
    """share of the memory bandwidth that element-wise kernels reach"""

    def __str__(self) -> str:
        certainty = f", a step within {self.spread:g} x either way" if self.spread > 1 else ""
        return f"{self.products:.2f}: {self.source}{certainty}"


GA102 = Reach(0.87, "timm's training speeds of ViT-S, B and L on an RTX 3090 (2022)", FITTED)
AD102 = Reach(
    0.84, "the RTX 3090's, by both cards' inference speeds in timm's tables", FITTED, 0.45
)
A100 = Reach(0.60, "NVIDIA NeMo's ViT-g/14 and DINOv2's ViT-L/16", FITTED)
HOPPER = Reach(0.39, "NVIDIA NeMo's ViT-g/14 on H100", FITTED)
VOLTA = Reach(0.12, "whole recipes of 2021 on V100: BEiT-B, DINO's ViT-S", LOOSE)
ASSUMED = Reach(0.45, "assumed, no published ViT training speed at hand")
MACHINE = Reach(1.0, "assumed; --calibrate measures this machine", 1.0)
