"""Orthogonal directions: Newton-Schulz on whole matrices, and what it costs.

The iteration and its coefficients are those of Muon (Jordan et al. 2024,
kellerjordan.github.io/posts/muon). With the singular value decomposition X = U S V', five rounds of

    X <- a X + (b A + c A A) X,   A = X X'        from X / |X|

bring all singular values into about [0.7, 1.2]; U and V stay. The rounds need the whole matrix: of
some of its rows, or of a flat slice, they make another direction.

Legend: Z blocks of equal size, M rows, N columns (of the flatter of a matrix and its transpose:
M <= N).
"""

import math
from typing import Literal

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SMALLEST_NORM = 1e-7

Adjust = Literal["match_rms_adamw", "original"]


def orthogonalise(x_RC: Tensor, steps: int, blocks: int = 1) -> Tensor:
    """Nearly orthogonal matrix with the singular vectors of another one.

    Args:
        x_RC: Matrix of R rows and C columns, fp32 or bf16, which is also the precision of all
            products.
        steps: Rounds of the iteration.
        blocks: Number of equal blocks of rows, each of which is orthogonalised by itself.

    Returns:
        A new tensor of the same shape and dtype. What is all zeros stays so.
    """
    x_ZMN = x_RC.view(blocks, -1, x_RC.shape[1])
    is_tall = x_ZMN.shape[1] > x_ZMN.shape[2]
    x_ZMN = x_ZMN.mT if is_tall else x_ZMN
    # the norm in the matrix's own precision, as in torch.optim.Muon
    norm_Z = torch.stack([x_MN.norm() for x_MN in x_ZMN]).clamp(min=SMALLEST_NORM)
    x_ZMN = x_ZMN / norm_Z[:, None, None]
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram_ZMM = x_ZMN @ x_ZMN.mT
        update_ZMM = torch.baddbmm(gram_ZMM, gram_ZMM, gram_ZMM, beta=b, alpha=c)
        x_ZMN = torch.baddbmm(x_ZMN, update_ZMM, x_ZMN, beta=a)
    return (x_ZMN.mT if is_tall else x_ZMN).reshape(x_RC.shape)


def count_operations(rows: int, columns: int, steps: int, blocks: int = 1) -> float:
    """Floating-point operations of `orthogonalise`; a multiply-add is two.

    Args:
        rows: Rows of the matrix.
        columns: Columns of the matrix.
        steps: Rounds of the iteration.
        blocks: Number of equal blocks of rows.
    """
    short, long = sorted((rows // blocks, columns))
    return float(blocks * steps * (4 * short**2 * long + 2 * short**3))


def direction_scale(rows: int, columns: int, adjust: Adjust) -> float:
    """Factor on an orthogonal direction, beside the learning rate.

    Args:
        rows: Rows of the matrix, or of one block of it.
        columns: Columns of the matrix.
        adjust: "match_rms_adamw" gives the direction the RMS that AdamW's usually has, 0.2 (arXiv
            2502.16982), so that AdamW's rate and decay fit; "original" is Jordan's
            sqrt(max(1, rows / columns)).
    """
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))
