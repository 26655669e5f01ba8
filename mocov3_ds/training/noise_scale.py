"""The gradient noise scale: the batch at which noise and signal of the gradient are alike.

McCandlish et al. (arXiv 1812.06162): with S the trace of the covariance of one image's gradient and
G the true gradient, a batch of B images gives a gradient with noise S / B; batches far above the
noise scale S / |G|^2 buy little.

Both come from the two halves of a batch, each a batch of its own: its own keys, negatives and
batch-norm statistics. Their gradients a and b are then independent draws, so that on average

    a . b     = |G|^2                 and           |a - b|^2 = 2 S / (B / 2)

Pieces of one batch that share these would not do. Batch norm takes the mean of all pieces away,
so they pull against each other, and |G|^2 comes out below 0. What is measured is the loss at half
the run's batch, with half its negatives; a contrastive loss has no gradient of one image, and S is
B / 2 times what such a half deviates by. Averages over steps are to be taken of S and of |G|^2,
before dividing: the ratio of one step is noise itself.

Shape suffixes: B = images of this rank, H = of its half, P = pairs of neighbours, W = weights.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mocov3_ds.data.splitmix import hash_words

_STREAM = 0x6E6F6973652B0A11
"""sets the draw of the halves apart from those of views and order"""


class NoiseScale(NamedTuple):
    """What the halves of one batch say; see the module's text."""

    trace: float
    """S, the squared deviation of an image's gradient from the mean, all weights together"""
    gradient_square: float
    """|G|^2, unbiased: below 0 where the noise hides the gradient"""

    @property
    def batch(self) -> float:
        """The noise scale in images; NaN where the noise hides the gradient."""
        return self.trace / self.gradient_square if self.gradient_square > 0 else float("nan")


def draw_halves(sample_ids_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a rank's two halves, (H,) each: of every two neighbours one, as their numbers say.

    So each rank has as many of either half, and the halves of the global batch are the same on any
    number of ranks.

    Args:
        sample_ids_B: number of each image in the manifest, an even number of images.
    """
    assert len(sample_ids_B) % 2 == 0, "every image has a neighbour"
    words_P2 = hash_words(_STREAM, sample_ids_B).reshape(-1, 2)
    second_P = (words_P2[:, 0] > words_P2[:, 1]).astype(np.int64)
    first_of_pair_P = np.arange(0, len(sample_ids_B), 2)
    return first_of_pair_P + second_P, first_of_pair_P + 1 - second_P


def noise_of_halves(first_W: Tensor, second_W: Tensor, images: int) -> NoiseScale:
    """Noise and signal of a gradient, from those of two independent batches.

    Args:
        first_W: gradient of the mean loss of one of them.
        second_W: that of the other one's.
        images: number of images in each of them.
    """
    first_W, second_W = first_W.double(), second_W.double()
    trace = images / 2 * float((first_W - second_W).square().sum())
    return NoiseScale(trace, float(first_W @ second_W))
