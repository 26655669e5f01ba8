"""N ranks compute what one computes: gather, batch norm, loss, gradients, LAMB, momentum encoder.

The real step runs on all ranks; beside it each rank computes the whole global batch by itself, in
fp64, as `plain` has it. Each quantity is compared from the same starting point, so that a wrong one
does not spoil the verdict on the next. Softplus instead of ReLU in the heads: at a kink fp32 and
fp64 may choose different sides, and then nothing compares.

Shape suffixes: B = rank batch, G = global batch, C H W = image, D = features.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mocov3_ds.checks import plain
from mocov3_ds.checks.finding import Finding, judged, sound
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import (
    engine_config,
    full_gradients,
    full_tensors,
    start_engine,
)
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.heads import BatchNormOverRanks
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import VitShape
from mocov3_ds.optim.lamb import Lamb
from mocov3_ds.optim.rules import vit_rule
from mocov3_ds.training.step import QueriesToLoss, train_step

_SHAPE = EncoderShape(
    vit=VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3), hidden=20, out=12
)
_STAGES = (0, 1, 2, 3)
_STEPS = 2  # some errors of sharding show in the second step only
_LR, _DECAY, _MOMENTUM, _TEMPERATURE = 2e-2, 0.1, 0.9, 0.2

_NETWORK = (
    "the ranks do not compute one batch: check that all run the same versions (see above), and on "
    "GPUs try NCCL_P2P_DISABLE=1, NCCL_ALGO=Ring and another node to find the faulty link or card."
)
_SHARDING = (
    "this DeepSpeed shards tensors in a way that is not known here: install the version that "
    "pyproject.toml names, or train at a stage that passes (--ds zero_optimization.stage=N)."
)


# ------------------------------------------------------------------------------------- single parts


def check_gather(device: torch.device) -> Finding:
    """Rows of all ranks arrive whole and in rank order."""
    rows, width = 5, 7
    first = ranks.rank() * rows * width
    mine = torch.arange(first, first + rows * width, device=device, dtype=torch.float32)
    gathered = ranks.all_gather_cat(mine.view(rows, width)).cpu()
    wanted = torch.arange(ranks.world_size() * rows * width, dtype=torch.float32).view(-1, width)
    same = gathered.shape == wanted.shape and torch.equal(gathered, wanted)
    wrong = 0 if same else _rows_that_differ(gathered, wanted)
    return sound(
        "key gather",
        f"{len(wanted) - wrong} of {len(wanted)} rows",
        "all rows, in rank order",
        trouble=not same,
        remedy=_NETWORK,
        numbers={"rows": len(wanted), "wrong": wrong},
    )


def _rows_that_differ(ours: Tensor, wanted: Tensor) -> int:
    if ours.shape != wanted.shape:
        return len(wanted)
    return int((ours != wanted).any(1).sum())


def check_batch_norm(device: torch.device) -> Finding:
    """Outputs, running statistics and gradients of the batch norm over ranks against whole rows."""
    generator = torch.Generator().manual_seed(3)
    rows, features = _rows(), 6
    total = rows * ranks.world_size()
    mine = slice(ranks.rank() * rows, (ranks.rank() + 1) * rows)
    # each rank's rows have a mean of their own, so that local statistics would show
    shift_G1 = torch.arange(total, dtype=torch.float64)[:, None] / rows
    x_GD = torch.randn(total, features, generator=generator, dtype=torch.float64) + shift_G1
    pull_GD = torch.randn(total, features, generator=generator, dtype=torch.float64)
    ours, theirs = BatchNormOverRanks(features).to(device), nn.BatchNorm1d(features).double()
    x_BD = x_GD[mine].float().to(device).requires_grad_()
    y_BD = ours(x_BD)
    y_BD.backward(pull_GD[mine].float().to(device))
    whole_GD = x_GD.clone().requires_grad_()
    wanted_GD = theirs(whole_GD)
    wanted_GD.backward(pull_GD)
    assert x_BD.grad is not None and whole_GD.grad is not None
    weight_D = ranks.all_reduce_sum(_gradient(ours.weight).clone())
    running = torch.cat([ours.running_mean, ours.running_var])
    assert theirs.running_mean is not None and theirs.running_var is not None
    return judged(
        "batch norm over ranks",
        {
            "output": distance(y_BD, wanted_GD[mine]),
            "statistics": distance(running, torch.cat([theirs.running_mean, theirs.running_var])),
            "gradient": distance(x_BD.grad, whole_GD.grad[mine]),
            "weights' gradient": distance(weight_D, _gradient(theirs.weight)),
        },
        2e-5,
        _NETWORK,
    )


def _gradient(parameter: Any) -> Tensor:
    gradient: Tensor = parameter.grad
    return gradient


def distance(ours: Tensor, wanted: Tensor, floor: float = 0.0) -> float:
    """|ours - wanted| / (|wanted| + floor), norms in fp64."""
    ours, wanted = ours.detach().cpu().double(), wanted.detach().cpu().double()
    return float((ours - wanted).norm() / (wanted.norm() + floor).clamp_min(1e-300))


# -------------------------------------------------------------------------------------- whole steps


@dataclass
class Errors:
    """Largest errors of the steps at one ZeRO stage."""

    loss: float = 0.0
    gradient: float = 0.0
    lamb: float = 0.0
    momentum: float = 0.0
    ranks_differ: float = 0.0
    """1 where the momentum encoders of the ranks are not bit-equal"""

    def add(self, **errors: float) -> None:
        """Keep the larger ones; what is not a number is infinite."""
        for name, error in errors.items():
            error = error if error == error else float("inf")
            setattr(self, name, max(getattr(self, name), error))


def check_steps(device: torch.device) -> list[Finding]:
    """Loss, gradients, LAMB step and momentum encoder of the real step at each ZeRO stage."""
    found: dict[str, Errors] = {}
    trouble: list[str] = []
    for stage in _STAGES:
        try:
            found[f"ZeRO-{stage}"] = _errors_of(stage, device)
        except Exception as error:  # one stage must not hide the others
            trouble.append(f"ZeRO-{stage}: {type(error).__name__}: {error}")
    findings = [
        judged(name, {s: getattr(e, key) for s, e in found.items()}, limit, remedy, wanted=wanted)
        for name, key, limit, remedy, wanted in (
            ("loss, N ranks = 1 rank", "loss", 1e-5, _NETWORK, ""),
            ("gradients, N ranks = 1 rank", "gradient", 2e-5, _NETWORK, ""),
            ("LAMB step = unsharded LAMB", "lamb", 2e-5, _SHARDING, ""),
            ("momentum encoder = its formula", "momentum", 1e-6, _SHARDING, ""),
            ("momentum encoder, bit-equal ranks", "ranks_differ", 0.0, _NETWORK, "equal"),
        )
        if found
    ]
    if trouble:
        text = "; ".join(" ".join(t.split())[:200] for t in trouble)
        findings.append(Finding("training step", "fail", text, "every ZeRO stage runs", _SHARDING))
    return findings


def check_determinism(device: torch.device) -> Finding:
    """The same step twice from the same start gives the same bits."""
    digests = []
    for _ in range(2):
        engine, momentum, _optimizer = _start(1, device)
        for step in range(_STEPS):
            train_step(engine, momentum, *_views(step, device), momentum=_MOMENTUM)
        digests.append(_digest(full_tensors(engine.module.base)))
        engine.destroy()
    same = digests[0] == digests[1]
    return Finding(
        "one step twice",
        "pass" if same else "note" if device.type == "cuda" else "fail",
        "the same bits" if same else "other bits",
        "the same bits",
        "" if same else "runs do not repeat to the bit; --deterministic refuses such kernels.",
        {"differ": float(not same)},
    )


def _errors_of(stage: int, device: torch.device) -> Errors:
    engine, momentum, _optimizer = _start(stage, device)
    try:
        return _compare(engine, momentum, device)
    finally:
        engine.destroy()


def _compare(engine: Any, momentum: MomentumEncoder, device: torch.device) -> Errors:
    """Each step against `plain`, started from the real step's own state."""
    errors, lamb = Errors(), plain.Lamb(_LR, _DECAY)
    backbone = BaseEncoder(_SHAPE).backbone.double()
    witness = _Witness(engine)
    for step in range(_STEPS):
        base = _wide(full_tensors(engine.module.base))
        keys = _wide(momentum.full_state())
        trained = {n for n, p in engine.module.base.named_parameters() if p.requires_grad}
        result = train_step(witness, momentum, *_views(step, device), momentum=_MOMENTUM)
        # the momentum encoder moves from the weights before the step (the paper's order)
        moved = plain.moved(keys, base, trained & {*keys}, _MOMENTUM)
        after = _wide(momentum.full_state())
        averaged = [n for n in moved if "running_" not in n and "num_batches" not in n]
        leaves = {n: t.clone().requires_grad_(n in trained) for n, t in base.items()}
        loss = plain.loss(backbone, leaves, moved, *_all_views(step), _TEMPERATURE)
        loss.backward()  # type: ignore[no-untyped-call]
        wanted = {n: _gradient(leaves[n]) for n in sorted(trained)}
        ours = {n.removeprefix("base."): g for n, g in witness.gradients.items()}
        matrices = {n for n in trained if vit_rule(n, tuple(base[n].shape)).adapt}
        stepped = lamb.step(base, ours, matrices)
        weights = _wide(full_tensors(engine.module.base))
        errors.add(
            loss=abs(result.loss - float(loss.detach())) / abs(float(loss.detach())),
            gradient=_gradient_error(ours, wanted),
            lamb=max(_movement_error(weights[n], stepped[n], base[n]) for n in sorted(trained)),
            momentum=max(distance(after[n], moved[n], floor=1e-3) for n in averaged),
            ranks_differ=float(len({*ranks.gather_objects(_digest(momentum.full_state()))}) > 1),
        )
    return errors


def _gradient_error(ours: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Largest over tensors; a gradient that is zero but for rounding counts by the whole one."""
    whole = float(torch.stack([g.norm() for g in wanted.values()]).norm())
    return max(distance(ours[n], g, floor=1e-2 * whole) for n, g in wanted.items())


def _movement_error(ours: Tensor, wanted: Tensor, before: Tensor) -> float:
    """Difference relative to how far the tensor moved."""
    return float((ours - wanted).norm() / (wanted - before).norm().clamp_min(1e-300))


class _Witness:
    """An engine that notes its reduced gradients when it is told to step."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, *arguments: Any) -> Any:
        return self._engine(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> None:
        self.gradients = _wide(full_gradients(self._engine.module))
        self._engine.step()


def _start(stage: int, device: torch.device) -> tuple[Any, MomentumEncoder, Lamb]:
    """Engine, momentum encoder and optimizer, the same at each call."""
    torch.manual_seed(0)
    base, momentum = BaseEncoder(_SHAPE), MomentumEncoder(_SHAPE, device=device)
    for part in (base.projector, base.predictor, momentum.projector):
        _smooth(part)
    model = QueriesToLoss(base, temperature=_TEMPERATURE).to(device)
    optimizer = Lamb(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        lr=_LR,
        weight_decay=_DECAY,
    )
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # shard the small tensors, too
        zero["stage3_param_persistence_threshold"] = 0
    batch = _rows() * ranks.world_size()
    config = engine_config(
        {"zero_optimization": zero}, global_batch=batch, world_size=ranks.world_size()
    )
    engine = start_engine(model, optimizer, config)
    momentum.start_from(dict(full_tensors(engine.module.base)))
    momentum.follow(engine.module.base)
    return engine, momentum, optimizer


def _smooth(part: nn.Module) -> None:
    for name, child in list(part.named_children()):
        if isinstance(child, nn.ReLU):
            setattr(part, name, nn.Softplus())


def _rows() -> int:
    """Rows of a rank."""
    return max(4, 8 // ranks.world_size())


def _all_views(step: int) -> tuple[Tensor, Tensor]:
    """Both views of the whole batch (G, C, H, W), fp64 on the CPU."""
    generator = torch.Generator().manual_seed(step)
    size = _SHAPE.vit.image_size
    batch = _rows() * ranks.world_size()
    first, second = (torch.randn(batch, 3, size, size, generator=generator) for _ in range(2))
    return first.double(), second.double()


def _views(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """This rank's part of them (B, C, H, W), fp32 on the device."""
    mine = slice(ranks.rank() * _rows(), (ranks.rank() + 1) * _rows())
    first, second = (x_GCHW[mine].float().to(device) for x_GCHW in _all_views(step))
    return first, second


def _wide(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {n: t.detach().cpu().double().clone() for n, t in tensors}


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
