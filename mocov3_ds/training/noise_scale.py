"""The gradient noise scale: the batch at which noise and signal of the gradient are alike.

McCandlish et al. (arXiv 1812.06162): with S the trace of the covariance of one image's gradient and
G the true gradient, a batch of B images gives a gradient with noise S / B; batches far above the
noise scale S / |G|^2 buy little. Both come from one batch that is cut into pieces: the spread
between the pieces is S over a piece's size.

What an image's gradient is. The contrastive loss of a batch is no sum over images. Here it is what
an image gives to the gradient of the backbone through its own features, both views together, with
keys, negatives and batch-norm statistics those of the whole batch as they are. So S counts the
choice of the images that are trained on and their views, not the noise of who else is in the batch,
and weights of the heads are left out. S and |G|^2 are unbiased but for that; their ratio is not, so
averages over steps are to be taken of each, before dividing.

Shape suffixes: G = images of the global batch, N = pieces, B = images of this rank.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mocov3_ds.data.splitmix import hash_words

_STREAM = 0x6E6F6973652B0A11
"""sets the draw of the pieces apart from those of views and order"""


class NoiseScale(NamedTuple):
    """What the pieces of one batch say; see the module's text."""

    trace: float
    """S, the squared deviation of an image's gradient from the mean, all weights together"""
    gradient_square: float
    """|G|^2, unbiased: below 0 where the noise hides the gradient"""

    @property
    def batch(self) -> float:
        """The noise scale in images; NaN where the noise hides the gradient."""
        return self.trace / self.gradient_square if self.gradient_square > 0 else float("nan")


def draw_pieces(sample_ids_G: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Piece of each image of a global batch, (G,): a function of the samples alone.

    Sizes differ by one image at most. Neighbours in a shard may be alike, so pieces are drawn.

    Args:
        sample_ids_G: number of each image in the manifest.
        count: pieces, at most G.
    """
    order_G = np.argsort(hash_words(_STREAM, sample_ids_G), kind="stable")
    pieces_G = np.empty(len(sample_ids_G), np.int64)
    pieces_G[order_G] = np.arange(len(sample_ids_G)) * count // len(sample_ids_G)
    return pieces_G


def noise_of_pieces(
    squares_N: NDArray[np.float64], sizes_N: NDArray[np.int64], mean_square: float
) -> NoiseScale:
    """Noise and signal of a gradient whose batch is cut into pieces.

    The pieces' spread N_i |p_i - p|^2, summed and divided by their number less one, is S on
    average, whatever their sizes; |p|^2 is too large by S / G.

    Args:
        squares_N: |p_i|^2 of the mean p_i over a piece of what each image gives, (N,), N >= 2.
        sizes_N: images of each piece.
        mean_square: |p|^2 of the mean over all images.
    """
    images = int(sizes_N.sum())
    spread = float((sizes_N * squares_N).sum() - images * mean_square)
    trace = max(spread, 0.0) / (len(sizes_N) - 1)
    return NoiseScale(trace, mean_square - trace / images)
