"""Where a step goes wrong: each stage of it is measured, and samples and tensors are named.

The step runs once more, forward and backward, through the engine itself with hooks on it, and is
then dropped: weights, momentum encoder, batch-norm statistics and loss scale stay as they were.

Shape suffixes: B = rank batch, C H W = image, D = features, P = head output.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks, zero
from mocov3_ds.distributed.gradients import full_gradients
from mocov3_ds.distributed.guarded_step import DROP, step_within
from mocov3_ds.model.base_encoder import BaseEncoder
from mocov3_ds.model.momentum_encoder import ViewKeys
from mocov3_ds.training.advance import draw_step, seed_drawing
from mocov3_ds.training.run import Run
from mocov3_ds.training.step import Draws, ForwardResult, make_both_keys

_OUTLIERS = 8  # samples named where none is certainly bad
_BAD_SAMPLES = 64  # samples named at most


class StageName(StrEnum):
    """Stages of a step in their order; the names are those of RUN/trouble and of `replay`."""

    VIEW_1 = "view 1"
    VIEW_2 = "view 2"
    FEATURES_1 = "features 1"
    QUERIES_1 = "queries 1"
    FEATURES_2 = "features 2"
    QUERIES_2 = "queries 2"
    KEYS_1 = "keys 1"
    KEYS_2 = "keys 2"
    LOSS = "loss"


@dataclass(frozen=True)
class Stage:
    """A stage of the step, or the gradient of a tensor, over all ranks."""

    name: str
    """a `StageName`, or the name of the tensor"""
    largest: float
    """largest finite absolute value"""
    not_finite: int
    """number of values that are not finite"""
    ranks: tuple[int, ...] = ()
    """ranks that have such values; empty for a gradient, which is the same on all"""


@dataclass(frozen=True)
class Suspect:
    """A sample that may be to blame."""

    rank: int
    row: int
    """row in the rank's batch"""
    id: int
    """number of the sample in the manifest"""
    norms: tuple[float, float]
    """L2 norms of its features in view 1 and view 2"""
    certain: bool
    """True where its own views or features are not finite, False where its norms stand out"""
    distance: float
    """|log(norm / median norm of the rank)|, the larger of both views"""


@dataclass(frozen=True)
class Diagnosis:
    """What was found, the same on all ranks."""

    loss: float
    stages: list[Stage]
    """stages in the order of the step"""
    gradients: list[Stage]
    """gradient of each trained tensor, in the order of the model"""
    suspects: list[Suspect]
    ids: list[list[int]]
    """numbers of the samples of the step, for each rank"""

    @property
    def first(self) -> Stage | None:
        """The first stage or gradient that is not finite; None where all are."""
        return next((s for s in (*self.stages, *self.gradients) if s.not_finite), None)

    @property
    def is_of_the_input(self) -> bool:
        """Whether the views themselves are not finite, so that no weights are to blame."""
        views = (StageName.VIEW_1, StageName.VIEW_2)
        return any(stage.not_finite for stage in self.stages if stage.name in views)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; numbers that JSON does not know become text."""
        return {name: _to_json(value) for name, value in asdict(self).items()}


StepTensors = dict[StageName, Tensor]
"""tensor of each stage on this rank, in the order of the step"""


def diagnose_step(run: Run, x1_BCHW: Tensor, x2_BCHW: Tensor, sample_ids_B: Tensor) -> Diagnosis:
    """Run the coming step on given views and look at each stage; all ranks must call.

    Args:
        run: The run, which stays as it is.
        x1_BCHW: First views of this rank, as the network takes them.
        x2_BCHW: Second views of the same samples.
        sample_ids_B: Numbers of these samples in the manifest.
    """
    tensors, gradients = _record_step(run, x1_BCHW, x2_BCHW, draw_step(run, sample_ids_B))
    local = {
        "stages": [(name, *_measure(tensor)) for name, tensor in tensors.items()],
        "suspects": _find_suspects(tensors, sample_ids_B),
        "ids": sample_ids_B.tolist(),
        "loss": float(tensors[StageName.LOSS].detach()),
    }
    of_ranks = ranks.gather_objects(local)
    return Diagnosis(
        loss=math.fsum(rank["loss"] for rank in of_ranks) / len(of_ranks),
        stages=_join_stages([rank["stages"] for rank in of_ranks]),
        gradients=gradients,
        suspects=_select_suspects([s for rank in of_ranks for s in rank["suspects"]]),
        ids=[rank["ids"] for rank in of_ranks],
    )


def _record_step(
    run: Run, x1_BCHW: Tensor, x2_BCHW: Tensor, draws: Draws
) -> tuple[StepTensors, list[Stage]]:
    """Run the step and drop it; return its tensors, and the gradients measured."""
    engine, encoder = run.engine, run.momentum_encoder
    chunk, scale = engine.module.chunks.size, zero.read_loss_scale(engine)
    tensors = {StageName.VIEW_1: x1_BCHW, StageName.VIEW_2: x2_BCHW}

    def make_keys() -> tuple[ViewKeys, ViewKeys]:
        view1, view2 = make_both_keys(encoder, x1_BCHW, x2_BCHW, chunk, draws)
        tensors.update({StageName.KEYS_1: view1.keys_BP, StageName.KEYS_2: view2.keys_BP})
        return view1, view2

    with _recorded_heads(run.base, tensors), _restored_buffers([run.model, encoder]):
        seed_drawing(run)
        forward: ForwardResult = engine(x1_BCHW, x2_BCHW, make_keys, draws)
        tensors[StageName.LOSS] = forward.loss
        engine.backward(forward.loss)
        gradients = [Stage(name, *_measure(g)) for name, g in full_gradients(engine.module)]
        step_within(engine, DROP)
        zero.load_loss_scale(engine, scale)
    return tensors, gradients


@contextmanager
def _recorded_heads(base: BaseEncoder, tensors: StepTensors) -> Iterator[None]:
    """Record features and queries of view 1, then of view 2, as the heads get and make them."""
    features = iter((StageName.FEATURES_1, StageName.FEATURES_2))
    queries = iter((StageName.QUERIES_1, StageName.QUERIES_2))

    def record_features(_: Any, inputs: tuple[Tensor, ...]) -> None:
        tensors[next(features)] = inputs[0].detach()

    def record_queries(_: Any, __: Any, output: Tensor) -> None:
        tensors[next(queries)] = output.detach()

    hooks = [
        base.projector.register_forward_pre_hook(record_features),
        base.predictor.register_forward_hook(record_queries),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _restored_buffers(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Bring statistics back to what they are now: the real step changes them, not this one."""
    contents = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, content in contents:
            buffer.copy_(content)


def _measure(tensor: Tensor) -> tuple[float, int]:
    """Return the largest finite absolute value, and the number of values that are not finite."""
    values = tensor.detach().float()
    finite = values.isfinite()
    size = torch.where(finite, values.abs(), torch.zeros_like(values))
    return float(size.max()) if size.numel() else 0.0, int((~finite).sum())


def _join_stages(stages_of_ranks: list[list[tuple[str, float, int]]]) -> list[Stage]:
    stages = []
    for rows in zip(*stages_of_ranks, strict=True):
        bad_ranks = tuple(rank for rank, (_, _, count) in enumerate(rows) if count)
        largest, not_finite = max(row[1] for row in rows), sum(row[2] for row in rows)
        stages.append(Stage(rows[0][0], largest, not_finite, bad_ranks))
    return stages


def _find_suspects(tensors: StepTensors, sample_ids_B: Tensor) -> list[Suspect]:
    """Return the samples of this rank that are certainly bad, or else those that stand out."""
    features = (StageName.FEATURES_1, StageName.FEATURES_2)
    norms_2B = torch.stack([tensors[name].float().norm(dim=1) for name in features])
    finite_B = norms_2B.isfinite().all(0)
    for name in (StageName.VIEW_1, StageName.VIEW_2):
        finite_B &= tensors[name].flatten(1).isfinite().all(1)
    median_2 = norms_2B.nanmedian(dim=1).values.clamp(min=1e-30)
    distance_B = (norms_2B / median_2[:, None]).clamp(min=1e-30).log().abs().amax(0)
    distance_B = torch.where(finite_B, distance_B.nan_to_num(), torch.inf)
    order = distance_B.argsort(descending=True, stable=True).tolist()
    bad_count = int((~finite_B).sum())
    return [
        Suspect(
            rank=ranks.rank(),
            row=row,
            id=int(sample_ids_B[row]),
            norms=(float(norms_2B[0, row]), float(norms_2B[1, row])),
            certain=not bool(finite_B[row]),
            distance=float(distance_B[row]),
        )
        for row in order[: min(bad_count, _BAD_SAMPLES) or _OUTLIERS]
    ]


def _select_suspects(suspects: Sequence[Suspect]) -> list[Suspect]:
    """Return the certain ones of all ranks, or where there are none those that stand out most."""
    certain = [suspect for suspect in suspects if suspect.certain]
    if certain:
        return certain[:_BAD_SAMPLES]
    return sorted(suspects, key=lambda suspect: -suspect.distance)[:_OUTLIERS]


def _to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
