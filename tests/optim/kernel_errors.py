"""What every set of kernels is held to: the written-out formulas, and torch's AdamW."""

import torch

from mocov3_ds.checks.optimizer_kernels import (
    ADAM,
    LIMIT,
    RATES,
    ROWS,
    make_flat_step,
    make_rates,
    measure_all_errors,
    relative,
)
from mocov3_ds.optim.kernel_types import Kernels


def check_exact(kernels: Kernels) -> None:
    """Each case of each kernel is the formula up to fp32's rounding."""
    for case, error in measure_all_errors(kernels).items():
        assert error < LIMIT, case


def check_adamw(kernels: Kernels) -> None:
    """AdamW in one pass moves a segment as torch's AdamW does."""
    flat = make_flat_step(kernels, ADAM, 3, gap=3, moments=2)
    for x in flat.tensors:
        x.nan_to_num_(0.1)
    w, g, m, v = flat.tensors
    segment = flat.share.flat.segments[-1]
    parameter = torch.nn.Parameter(segment.of(w).clone())
    optimizer = torch.optim.AdamW(
        [parameter], lr=RATES[-1], betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1
    )
    optimizer.state[parameter] = {
        "step": torch.tensor(2.0),
        "exp_avg": segment.of(m).clone(),
        "exp_avg_sq": segment.of(v).clone(),
    }
    parameter.grad = segment.of(g).clone()
    kernels.update_adam(flat, torch.zeros(3, ROWS), make_rates())
    optimizer.step()
    assert relative(segment.of(w), parameter.detach().double()) < 2e-7
