"""What is measured of a run's loss every so many steps, before the step: curvature, noise scale.

    instruments = Instruments(signals, model, device, dtype)   before the engine takes the model
    values = instruments.measure(step, lr, optimizer, batch, sample_ids_B)

    sharpness          largest eigenvalue of P^-1 H, see `curvature` and `optim.preconditioner`
    sharpness_limit    where it makes steps unstable: 38 / lr
    curvature          along the gradient's own step P^-1 g
    curvature_limit    where such a step makes the loss rise: 2 / lr
    noise_trace, gradient_square, noise_scale       see `noise_scale`

H is of the exact loss of the coming global batch at the present weights, keys fixed. The numbers
are those of the global batch: the same on any number of ranks up to rounding.

Shape suffixes: W = all trained weights in one row, N = pieces, G = images of the global batch,
B = those of this rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from mocov3_ds.config.parts import SignalConfig
from mocov3_ds.distributed import ranks
from mocov3_ds.model.backbones import BackboneFacts
from mocov3_ds.optim.preconditioner import (
    has_preconditioner,
    inverse_preconditioner,
    sharpness_limit,
)
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.training.curvature import directional_curvature, largest_eigenvalue
from mocov3_ds.training.measured_copy import FixedBatch, MeasuredCopy
from mocov3_ds.training.noise_scale import NoiseScale, draw_pieces, noise_of_pieces
from mocov3_ds.training.step import QueriesToLoss

_STEP = 1e-4
"""length of a difference's step to either side, relative to that of all weights"""
_FIRST_ITERATIONS, _LATER_ITERATIONS = 30, 8
"""products at most: from random numbers, and from the last measurement's direction"""
_TOLERANCE = 0.01
"""growth of the eigenvalue in an iteration at which it is taken as found"""
_PIECES = 8
"""pieces of a batch, over which the noise scale is measured"""


class Instruments:
    """Measures a run's loss on a copy of its network; the run itself stays as it is.

    Args:
        signals: how often what is measured.
        model: the trained module before an engine takes it over.
        device: where to compute.
        dtype: dtype that the engine casts weights to.
    """

    def __init__(
        self, signals: SignalConfig, model: QueriesToLoss, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.signals = signals
        """how often what is measured; where anything was to be, it may be changed between steps"""
        needs_copy = signals.sharpness_every or signals.noise_every
        self._copy = MeasuredCopy(model, device, dtype) if needs_copy else None
        self._direction_W: Tensor | None = None  # of the last measurement

    def prepare(self, model: QueriesToLoss, chunk: int) -> None:
        """Be as the trained module is beside its weights; with so many images at once, 0 = all."""
        assert self._copy is not None, "nothing is due without a copy"
        self._copy.take_buffers(model)
        self._copy.set_chunk(chunk)

    def are_due(self, step: int) -> bool:
        """Whether anything is measured before this step, counted from 1."""
        signals = self.signals
        return _is_due(step, signals.sharpness_every) or _is_due(step, signals.noise_every)

    def measure(
        self,
        step: int,
        lr: float,
        optimizer: ShardedOptimizer,
        batch: FixedBatch,
        sample_ids_B: Tensor,
    ) -> dict[str, float]:
        """Measure what is due before a step; all ranks must call.

        Args:
            step: number of the step, from 1.
            lr: learning rate of that step.
            optimizer: the run's optimizer, for weights and second moments.
            batch: this rank's part of the step's batch.
            sample_ids_B: numbers of this rank's samples in the manifest.

        Returns:
            Name -> value. Nothing of the curvature before an optimizer with second moments has
            made its first step.
        """
        assert self._copy is not None, "nothing is due without a copy"
        values: dict[str, float] = {}
        can_divide = optimizer.step_count > 0 or not has_preconditioner(optimizer)
        with random_numbers_kept(batch.views[0].device):
            weights_W = self._copy.join(_states(optimizer, "weight"))
            if _is_due(step, self.signals.sharpness_every) and can_divide:
                scale_W = self._copy.join(inverse_preconditioner(optimizer))
                values |= self._measure_curvature(self._copy, batch, weights_W, scale_W)
                values["sharpness_limit"] = sharpness_limit(optimizer, lr)
                values["curvature_limit"] = 2 / lr if lr else float("inf")
            if _is_due(step, self.signals.noise_every):
                sample_ids_B = sample_ids_B.to(weights_W.device)
                noise = measure_noise(self._copy, batch, weights_W, sample_ids_B)
                values["noise_trace"] = noise.trace
                values["gradient_square"] = noise.gradient_square
                values["noise_scale"] = noise.batch
        return values

    def _measure_curvature(
        self, network: MeasuredCopy, batch: FixedBatch, weights_W: Tensor, scale_W: Tensor
    ) -> dict[str, float]:
        root_W, start_W = scale_W.sqrt(), self._direction_W
        network.set_weights(weights_W)
        heads = network.differentiate_heads(batch)

        def product(u_W: Tensor) -> Tensor:
            return network.hessian_product(batch, heads, weights_W, u_W, _STEP)

        iterations = _LATER_ITERATIONS
        if start_W is None:
            generator = torch.Generator().manual_seed(0)  # the same on all ranks
            start_W = torch.randn(len(root_W), generator=generator).to(root_W.device)
            iterations = _FIRST_ITERATIONS
        sharpness, self._direction_W = largest_eigenvalue(
            lambda z_W: root_W * product(root_W * z_W),  # P^-1/2 H P^-1/2 has the same eigenvalues
            torch.where(root_W > 0, start_W, 0.0),
            iterations=iterations,
            tolerance=_TOLERANCE,
            decide=ranks.broadcast_object,
        )
        along = directional_curvature(product, network.gradient(batch, heads), scale_W)
        return {"sharpness": sharpness, "curvature": along}

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """The direction from which the next measurement starts, as whole tensors by name."""
        if self._copy is not None and self._direction_W is not None:
            yield from self._copy.split(self._direction_W)

    def load_full_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `full_state` gave; of an empty one random numbers are the start."""
        self._direction_W = None
        if self._copy is not None and {*self._copy.names} == {*tensors}:
            self._direction_W = self._copy.join(tensors.items())


def check_instruments(signals: SignalConfig, facts: BackboneFacts) -> None:
    """Refuse an instrument that a backbone cannot have.

    Raises:
        ValueError: the noise scale needs what each image gives on its own.
    """
    if signals.noise_every and facts.rows_know_each_other:
        raise ValueError(
            f"--signals.noise_every {signals.noise_every} needs a backbone whose features of an "
            "image depend on that image alone, and this one has batch norm; leave it out."
        )


def measure_noise(
    network: MeasuredCopy, batch: FixedBatch, weights_W: Tensor, sample_ids_B: Tensor
) -> NoiseScale:
    """Noise scale of the backbone's gradient on one global batch; all ranks must call.

    Args:
        network: the copy of the trained module.
        batch: this rank's part of it.
        weights_W: weights at which its gradient is taken.
        sample_ids_B: numbers of this rank's samples in the manifest.
    """
    sample_ids_G = ranks.all_gather_cat(sample_ids_B).cpu().numpy()
    images, first = len(sample_ids_G), ranks.rank() * len(sample_ids_B)
    pieces_G = draw_pieces(sample_ids_G, min(_PIECES, images))
    pieces_B = torch.from_numpy(pieces_G[first : first + len(sample_ids_B)])
    sizes_N = np.bincount(pieces_G)
    network.set_weights(weights_W)
    first_BD, second_BD, *_ = network.differentiate_heads(batch).gradients
    shares = (first_BD.detach(), second_BD.detach())
    squares, total_W = [], torch.zeros_like(weights_W[: network.backbone_numbers])
    for piece, size in enumerate(sizes_N):
        rows_R = (pieces_B == piece).nonzero().flatten().to(weights_W.device)
        sum_W = ranks.all_reduce_sum(network.pull_back(batch, shares, rows_R))
        sum_W *= images / ranks.world_size()
        squares.append(float(sum_W.double().square().sum()) / int(size) ** 2)
        total_W += sum_W
    mean_square = float(total_W.double().square().sum()) / images**2
    return noise_of_pieces(np.array(squares), sizes_N, mean_square)


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Within, running statistics may move; behind it they are what they were."""
    values_before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(values_before[name])


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Within, torch's random numbers may be drawn; behind it they go on as if none had been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _states(optimizer: ShardedOptimizer, key: str) -> Iterator[tuple[str, Tensor]]:
    return ((name, state[key]) for name, state in optimizer.full_state(key))


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
