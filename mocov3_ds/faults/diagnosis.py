"""Where a step goes wrong: each stage of it measured, the samples and the first tensor named.

The step is run once more, forward and backward, through the engine itself with hooks on it, then
dropped: weights, momentum encoder, batch-norm statistics and loss scale are as before.

Shape suffixes: B = rank batch, C H W = image, D = features.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import full_gradients
from mocov3_ds.distributed.guarded_step import DROP, step_within
from mocov3_ds.training.advance import seed_step
from mocov3_ds.training.run import Run

_SUSPECTS = 8  # samples named where none is certain
_NAMED = 64


@dataclass(frozen=True)
class Stage:
    """A stage of the step, or the gradient of a tensor, over all ranks."""

    name: str
    largest: float
    """largest finite absolute value"""
    not_finite: int
    """how many values are not finite"""
    ranks: tuple[int, ...] = ()
    """where they are; empty for a gradient, which belongs to all"""


@dataclass(frozen=True)
class Suspect:
    """A sample that may be to blame."""

    rank: int
    row: int
    """in the rank's batch"""
    id: int
    """in the manifest"""
    norms: tuple[float, float]
    """of its features in view 1 and view 2"""
    certain: bool
    """its own views or features are not finite; else it is one whose features' norm stands out"""
    distance: float
    """|log(norm / median norm of the rank)|, the larger of both views"""


@dataclass(frozen=True)
class Diagnosis:
    """What was found, alike on all ranks."""

    loss: float
    stages: list[Stage]
    """in the order of the step"""
    gradients: list[Stage]
    """of each trained tensor in the order of the model"""
    suspects: list[Suspect]
    ids: list[list[int]]
    """samples of the step, of each rank"""

    @property
    def first(self) -> Stage | None:
        """The first stage or gradient that is not finite; None where all are."""
        return next((s for s in (*self.stages, *self.gradients) if s.not_finite), None)

    @property
    def of_the_input(self) -> bool:
        """Whether the views themselves are not finite, so no weights are to blame."""
        return any(stage.not_finite for stage in self.stages if stage.name.startswith("view"))

    def as_json(self) -> dict[str, Any]:
        """JSON values; numbers that JSON does not know are words."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def examine(job: Run, x1_BCHW: Tensor, x2_BCHW: Tensor, ids_B: Tensor) -> Diagnosis:
    """Run the coming step on these views and look at each stage; all ranks must call."""
    engine, encoder = job.engine, job.momentum_encoder
    chunk, scale = engine.module.chunks.size, job.optimizer.loss_scale()
    caught = {"view 1": x1_BCHW, "view 2": x2_BCHW}

    def keys() -> tuple[Tensor, Tensor]:
        caught["keys 1"] = encoder.keys(x1_BCHW, chunk)
        caught["keys 2"] = encoder.keys(x2_BCHW, chunk)
        return caught["keys 1"], caught["keys 2"]

    with _heads_caught(job, caught), _buffers_kept([engine.module.base, encoder]):
        seed_step(job)
        loss, _ = engine(x1_BCHW, x2_BCHW, keys)
        caught["loss"] = loss
        engine.backward(loss)
        gradients = [Stage(name, *_measure(g)) for name, g in full_gradients(engine.module)]
        step_within(engine, DROP)
        job.optimizer.load_loss_scale(scale)
    mine = {
        "stages": [(name, *_measure(tensor)) for name, tensor in caught.items()],
        "suspects": _suspects(caught, ids_B),
        "ids": ids_B.tolist(),
        "loss": float(loss.detach()),
    }
    everyone = ranks.gather_objects(mine)
    return Diagnosis(
        loss=math.fsum(of_rank["loss"] for of_rank in everyone) / len(everyone),
        stages=_joined([of_rank["stages"] for of_rank in everyone]),
        gradients=gradients,
        suspects=_chosen([s for of_rank in everyone for s in of_rank["suspects"]]),
        ids=[of_rank["ids"] for of_rank in everyone],
    )


@contextmanager
def _heads_caught(job: Run, caught: dict[str, Tensor]) -> Iterator[None]:
    """Fill in features and queries of both views as the heads see and make them."""
    base = job.engine.module.base

    def into_projector(_: Any, inputs: tuple[Tensor, ...]) -> None:
        caught[f"features {1 + ('features 1' in caught)}"] = inputs[0].detach()

    def out_of_predictor(_: Any, __: Any, output: Tensor) -> None:
        caught[f"queries {1 + ('queries 1' in caught)}"] = output.detach()

    hooks = [
        base.projector.register_forward_pre_hook(into_projector),
        base.predictor.register_forward_hook(out_of_predictor),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _buffers_kept(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Leave statistics as they were: the step will be, or was, run for itself."""
    before = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, content in before:
            buffer.copy_(content)


def _measure(tensor: Tensor) -> tuple[float, int]:
    """Largest finite absolute value, and how many values are not finite."""
    wide = tensor.detach().float()
    finite = wide.isfinite()
    size = torch.where(finite, wide.abs(), torch.zeros_like(wide))
    return float(size.max()) if size.numel() else 0.0, int((~finite).sum())


def _joined(of_ranks: list[list[tuple[str, float, int]]]) -> list[Stage]:
    stages = []
    for rows in zip(*of_ranks, strict=True):
        bad = tuple(rank for rank, (_, _, count) in enumerate(rows) if count)
        stages.append(Stage(rows[0][0], max(r[1] for r in rows), sum(r[2] for r in rows), bad))
    return stages


def _suspects(caught: dict[str, Tensor], ids_B: Tensor) -> list[Suspect]:
    """Samples of this rank that are certainly bad, or those that stand out."""
    norms_2B = torch.stack([caught[f"features {view}"].float().norm(dim=1) for view in (1, 2)])
    finite_B = norms_2B.isfinite().all(0)
    for view in (1, 2):
        finite_B &= caught[f"view {view}"].flatten(1).isfinite().all(1)
    median_2 = norms_2B.nanmedian(dim=1).values.clamp(min=1e-30)
    distance_B = (norms_2B / median_2[:, None]).clamp(min=1e-30).log().abs().amax(0)
    distance_B = torch.where(finite_B, distance_B.nan_to_num(), torch.inf)
    order = distance_B.argsort(descending=True, stable=True).tolist()
    bad = int((~finite_B).sum())
    return [
        Suspect(
            rank=ranks.rank(),
            row=row,
            id=int(ids_B[row]),
            norms=(float(norms_2B[0, row]), float(norms_2B[1, row])),
            certain=not bool(finite_B[row]),
            distance=float(distance_B[row]),
        )
        for row in order[: min(bad, _NAMED) or _SUSPECTS]
    ]


def _chosen(suspects: list[Suspect]) -> list[Suspect]:
    """The certain ones of all ranks, or without any those that stand out most."""
    certain = [suspect for suspect in suspects if suspect.certain]
    if certain:
        return certain[:_NAMED]
    return sorted(suspects, key=lambda suspect: -suspect.distance)[:_SUSPECTS]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
