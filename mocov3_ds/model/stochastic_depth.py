"""Stochastic depth (arXiv 1603.09382) whose draws belong to a sample, not to a pass.

A branch of a block is left out for some images of a batch and scaled up for the others. Which ones
is a hash of (seed, step, sample, view, branch): the same however the batch is cut into chunks and
ranks, in a second pass that recomputes activations, and after a resume.

Shape suffixes: V = the two views, M = branches with stochastic depth, from input to output, B =
images of a rank's batch, b = images of a pass, N = tokens, D = embedding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers.drop import DropPath, drop_path
from torch import Tensor, nn

from mocov3_ds.data.splitmix import hash_counters, hash_words

_STREAM = 0x64657074685F2A01
"""sets these draws apart from those of views and order, which have the same seed"""


class StochasticDepth(nn.Module):
    """Leaves a branch out for some images; without factors of its own it draws as timm's does.

    Args:
        rate: share of images for which the branch is left out, from 0 to below 1.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factors_b: Tensor | None = None
        """what the branch of each image of the present pass is multiplied with"""

    def forward(self, x: Tensor) -> Tensor:
        """The branch (b, ...), scaled image by image."""
        if not self.training:
            return x
        if self.factors_b is None:
            return drop_path(x, self.rate, training=True)
        if len(x) != len(self.factors_b):
            raise ValueError(
                f"a branch with stochastic depth holds {len(x)} rows for "
                f"{len(self.factors_b)} images, so its draws cannot belong to images; give "
                "--model.drop_path 0 with this backbone."
            )
        return x * self.factors_b.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def replace_drop_paths(module: nn.Module) -> None:
    """Put `StochasticDepth` of the same rate in the place of each of timm's `DropPath`."""
    for child_name, child in list(module.named_children()):
        if isinstance(child, DropPath):
            branch = StochasticDepth(child.drop_prob) if child.drop_prob else nn.Identity()
            setattr(module, child_name, branch)
        else:
            replace_drop_paths(child)


def find_branches(module: nn.Module) -> list[StochasticDepth]:
    """The branches with stochastic depth inside a module, from input to output."""
    return [child for child in module.modules() if isinstance(child, StochasticDepth)]


def draw_factors(
    rates: Sequence[float], sample_ids_B: NDArray[np.int64], *, seed: int, step: int
) -> Tensor:
    """What each branch of each image is multiplied with in a step: (V, B, M), fp32.

    0 for an image whose branch is left out, 1 / (1 - rate) for the others.

    Args:
        rates: rate of each branch.
        sample_ids_B: number of each image in the manifest.
        seed: seed of the run.
        step: steps done before this one.
    """
    images_B = hash_words(hash_counters(seed, _STREAM, step), sample_ids_B)
    factors_VBM = np.empty((2, len(sample_ids_B), len(rates)), np.float32)
    for view in range(2):
        for branch, rate in enumerate(rates):
            words_B = hash_words(0, images_B + np.uint64(view * len(rates) + branch))
            uniform_B = (words_B >> np.uint64(11)) * 2.0**-53
            scale = 1.0 / (1.0 - rate) if rate < 1 else 0.0
            factors_VBM[view, :, branch] = np.where(uniform_B < rate, 0.0, scale)
    return torch.from_numpy(factors_VBM)


def set_factors(branches: Sequence[StochasticDepth], factors_bM: Tensor) -> None:
    """Give each branch its factors for the pass that comes next.

    Args:
        branches: all branches of the network, as `find_branches` gave them.
        factors_bM: factors of the images of that pass, on its device.
    """
    for branch, factors_b in zip(branches, factors_bM.unbind(1), strict=True):
        branch.factors_b = factors_b
