"""What is measured of a run's loss every so many steps, before the step: curvature, noise scale.

    instruments = Instruments(signals, model, device, dtype)   before the engine takes the model
    values = instruments.measure(step, lr, optimizer, sample_ids_B, fix_batch)

    sharpness          largest eigenvalue of P^-1 H, see `curvature` and `optim.preconditioner`
    sharpness_limit    where it makes steps unstable: 38 / lr
    curvature          along the gradient's own step P^-1 g
    curvature_limit    where such a step makes the loss rise: 2 / lr
    noise_trace, gradient_square, noise_scale       see `noise_scale`

H is of the exact loss of the coming global batch at the present weights, keys fixed. The numbers
are those of the global batch: the same on any number of ranks up to rounding.

Shape suffixes: W = all trained weights in one row, B = images of this rank, H = of its half.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mocov3_ds.config.parts import SignalConfig
from mocov3_ds.distributed import ranks
from mocov3_ds.optim.preconditioner import (
    has_preconditioner,
    inverse_preconditioner,
    sharpness_limit,
)
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.training.curvature import directional_curvature, largest_eigenvalue
from mocov3_ds.training.measured_copy import FixedBatch, MeasuredCopy
from mocov3_ds.training.noise_scale import NoiseScale, draw_halves, noise_of_halves
from mocov3_ds.training.step import QueriesToLoss

_STEP = 1e-4
"""length of a difference's step to either side, relative to that of all weights"""
_FIRST_ITERATIONS, _LATER_ITERATIONS = 30, 8
"""products at most: from random numbers, and from the last measurement's direction"""
_TOLERANCE = 0.01
"""growth of the eigenvalue in an iteration at which it is taken as found"""

FixBatch = Callable[[Tensor | None], FixedBatch]
"""of rows of this rank the batch that they are by themselves, with keys of their own; None = all"""


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
        sample_ids_B: Tensor,
        fix_batch: FixBatch,
    ) -> dict[str, float]:
        """Measure what is due before a step; all ranks must call.

        Args:
            step: number of the step, from 1.
            lr: learning rate of that step.
            optimizer: the run's optimizer, for weights and second moments.
            sample_ids_B: numbers of this rank's samples in the manifest.
            fix_batch: makes a batch of all images of the step, or of some rows of each rank.

        Returns:
            Name -> value. Nothing of the curvature before an optimizer with second moments has
            made its first step.
        """
        assert self._copy is not None, "nothing is due without a copy"
        values: dict[str, float] = {}
        can_divide = optimizer.step_count > 0 or not has_preconditioner(optimizer)
        with random_numbers_kept(sample_ids_B.device):
            weights_W = self._copy.join(_states(optimizer, "weight"))
            if _is_due(step, self.signals.sharpness_every) and can_divide:
                scale_W = self._copy.join(inverse_preconditioner(optimizer))
                values |= self._measure_curvature(self._copy, fix_batch(None), weights_W, scale_W)
                values["sharpness_limit"] = sharpness_limit(optimizer, lr)
                values["curvature_limit"] = 2 / lr if lr else float("inf")
            if _is_due(step, self.signals.noise_every):
                noise = measure_noise(self._copy, fix_batch, weights_W, sample_ids_B)
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


def check_instruments(signals: SignalConfig, batch: int, world_size: int) -> None:
    """Refuse an instrument that a batch is too small for.

    Args:
        signals: how often what is measured.
        batch: images of a step, all ranks together.
        world_size: number of ranks that share them.

    Raises:
        ValueError: the noise scale needs two halves, of two images or more.
    """
    images = batch // world_size
    if signals.noise_every and (images % 2 or batch < 4):
        raise ValueError(
            f"--signals.noise_every {signals.noise_every} compares the gradients of two halves of "
            f"a batch, so each rank needs an even number of images and all together 4 or more; "
            f"there are {images} on each of {world_size}. Change --batch, or leave it out."
        )


def measure_noise(
    network: MeasuredCopy, fix_batch: FixBatch, weights_W: Tensor, sample_ids_B: Tensor
) -> NoiseScale:
    """Noise scale of the gradient of all trained weights on one global batch; all ranks must call.

    Args:
        network: the copy of the trained module.
        fix_batch: makes a batch of some rows of each rank.
        weights_W: weights at which its gradient is taken.
        sample_ids_B: numbers of this rank's samples in the manifest.
    """
    network.set_weights(weights_W)
    gradients_W = []
    for rows_H in draw_halves(sample_ids_B.cpu().numpy()):
        half = fix_batch(torch.from_numpy(rows_H).to(weights_W.device))
        gradients_W.append(network.gradient(half, network.differentiate_heads(half)))
    images = len(sample_ids_B) // 2 * ranks.world_size()
    return noise_of_halves(gradients_W[0], gradients_W[1], images)


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
