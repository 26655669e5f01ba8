"""Do N ranks compute what one rank computes?

Compared are gather, batch norm, loss, gradients, LAMB and momentum encoder. The real step runs on
all ranks; beside it each rank computes the whole global batch by itself in fp64 (`plain_step`).
Each quantity is compared from the same starting point, so that a wrong one does not spoil the
verdict on the next. The heads have Softplus instead of ReLU: near the kink of ReLU fp32 and fp64
may choose different sides, and then nothing can be compared.

Shape suffixes: B = rank batch, G = global batch, C H W = image, D = features.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mocov3_ds.checks import plain_step
from mocov3_ds.checks.finding import Finding, judge_errors, judge_problem
from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import Engine, full_tensors, release_engine, start_engine
from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.distributed.gradients import full_gradients
from mocov3_ds.model.base_encoder import BaseEncoder, EncoderShape
from mocov3_ds.model.heads import BatchNormOverRanks
from mocov3_ds.model.loss import ContrastiveLoss
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.model.vit import VitShape
from mocov3_ds.optim.lamb import Lamb
from mocov3_ds.optim.rules import vit_rule
from mocov3_ds.training.step import QueriesToLoss, train_step

_SHAPE = EncoderShape(
    backbone=VitShape(image_size=16, patch_size=8, dim=24, depth=2, heads=3), hidden=20, out=12
)
ZERO_STAGES = (0, 1, 2, 3)
_STEPS = 2  # some errors of sharding show in the second step only
_LR, _DECAY, _TEMPERATURE = 2e-2, 0.1, 0.2
MOMENTUM = 0.9
"""share that the momentum encoder keeps in a step"""

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
    """Do the rows of all ranks arrive complete and in rank order?"""
    rows, width = 5, 7
    first = ranks.rank() * rows * width
    local_rows = torch.arange(first, first + rows * width, device=device, dtype=torch.float32)
    gathered = ranks.all_gather_cat(local_rows.view(rows, width)).cpu()
    expected = torch.arange(ranks.world_size() * rows * width, dtype=torch.float32).view(-1, width)
    if gathered.shape == expected.shape:
        wrong = int((gathered != expected).any(1).sum())
    else:
        wrong = len(expected)
    return judge_problem(
        "key gather",
        f"{len(expected) - wrong} of {len(expected)} rows",
        "all rows, in rank order",
        problem=wrong,
        remedy=_NETWORK,
        numbers={"rows": len(expected), "wrong": wrong},
    )


def check_batch_norm(device: torch.device) -> Finding:
    """Compare the batch norm over ranks with torch's on the global batch.

    Compared are outputs, running statistics and the gradients of inputs and weights.
    """
    generator = torch.Generator().manual_seed(3)
    rows, features = _rank_batch(), 6
    total = rows * ranks.world_size()
    rank_rows = slice(ranks.rank() * rows, (ranks.rank() + 1) * rows)
    # each rank's rows have another mean, so that statistics of one rank would show
    shift_G1 = torch.arange(total, dtype=torch.float64)[:, None] / rows
    x_GD = torch.randn(total, features, generator=generator, dtype=torch.float64) + shift_G1
    pull_GD = torch.randn(total, features, generator=generator, dtype=torch.float64)
    norm, reference = BatchNormOverRanks(features).to(device), nn.BatchNorm1d(features).double()
    x_BD = x_GD[rank_rows].float().to(device).requires_grad_()
    y_BD = norm(x_BD)
    y_BD.backward(pull_GD[rank_rows].float().to(device))
    global_GD = x_GD.clone().requires_grad_()
    expected_GD = reference(global_GD)
    expected_GD.backward(pull_GD)
    weight_D = ranks.all_reduce_sum(_gradient(norm.weight).clone())
    running = torch.cat([norm.running_mean, norm.running_var])
    assert reference.running_mean is not None and reference.running_var is not None
    expected_running = torch.cat([reference.running_mean, reference.running_var])
    return judge_errors(
        "batch norm over ranks",
        {
            "output": relative_distance(y_BD, expected_GD[rank_rows]),
            "statistics": relative_distance(running, expected_running),
            "gradient": relative_distance(_gradient(x_BD), _gradient(global_GD)[rank_rows]),
            "weights' gradient": relative_distance(weight_D, _gradient(reference.weight)),
        },
        2e-5,
        _NETWORK,
    )


def _gradient(tensor: Tensor | nn.Module) -> Tensor:
    assert isinstance(tensor, Tensor) and tensor.grad is not None
    return tensor.grad


def relative_distance(present: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|present - expected| / (|expected| + floor), norms in fp64."""
    present, expected = present.detach().cpu().double(), expected.detach().cpu().double()
    return float((present - expected).norm() / (expected.norm() + floor).clamp_min(1e-300))


def relative_difference(present: float, expected: float) -> float:
    """|present - expected| / |expected|; infinite where nothing is expected, as of no loss."""
    return abs(present - expected) / abs(expected) if expected else float("inf")


# -------------------------------------------------------------------------------------- whole steps


@dataclass
class Errors:
    """Largest relative errors of the steps at one ZeRO stage."""

    loss: float = 0.0
    gradient: float = 0.0
    lamb: float = 0.0
    momentum: float = 0.0
    ranks_differ: float = 0.0
    """1 where the momentum encoders of the ranks are not bit-equal"""

    def keep_largest(self, **errors: float) -> None:
        """Keep the larger of each error; one that is not a number counts as infinite."""
        for name, error in errors.items():
            error = error if error == error else float("inf")
            setattr(self, name, max(getattr(self, name), error))


def check_steps(device: torch.device, stages: Sequence[int] = ZERO_STAGES) -> list[Finding]:
    """Compare loss, gradients, LAMB step and momentum encoder of the real step.

    Args:
        device: the device of this rank.
        stages: the ZeRO stages to examine, each with an engine of its own.
    """
    errors: dict[str, Errors] = {}
    problems: list[str] = []
    for stage in stages:
        try:
            errors[f"ZeRO-{stage}"] = _measure_stage(stage, device)
        except Exception as error:  # one stage must not hide the others
            problems.append(f"ZeRO-{stage}: {type(error).__name__}: {error}")
    findings = [
        judge_errors(
            name,
            {stage: getattr(of_stage, key) for stage, of_stage in errors.items()},
            limit,
            remedy,
            expected=expected,
        )
        for name, key, limit, remedy, expected in (
            ("loss, N ranks = 1 rank", "loss", 1e-5, _NETWORK, ""),
            ("gradients, N ranks = 1 rank", "gradient", 2e-5, _NETWORK, ""),
            ("LAMB step = unsharded LAMB", "lamb", 2e-5, _SHARDING, ""),
            ("momentum encoder = its formula", "momentum", 1e-6, _SHARDING, ""),
            ("momentum encoder, bit-equal ranks", "ranks_differ", 0.0, _NETWORK, "equal"),
        )
        if errors
    ]
    if problems:
        text = "; ".join(" ".join(problem.split())[:200] for problem in problems)
        findings.append(Finding("training step", "fail", text, "every ZeRO stage runs", _SHARDING))
    return findings


def check_determinism(device: torch.device) -> Finding:
    """Does the same step twice from the same start give the same bits?"""
    digests = []
    for _ in range(2):
        engine, momentum = start_network(1, device)
        for step in range(_STEPS):
            train_step(engine, momentum, *rank_views(step, device), momentum=MOMENTUM)
        digests.append(_hash_tensors(full_tensors(engine.module.base)))
        release_engine(engine)
    repeats = digests[0] == digests[1]
    return Finding(
        "one step twice",
        "pass" if repeats else "note" if device.type == "cuda" else "fail",
        "the same bits" if repeats else "other bits",
        "the same bits",
        "" if repeats else "runs do not repeat to the bit; --deterministic refuses such kernels.",
        {"differ": float(not repeats)},
    )


def _measure_stage(stage: int, device: torch.device) -> Errors:
    engine, momentum = start_network(stage, device)
    try:
        return _compare_steps(engine, momentum, device)
    finally:
        release_engine(engine)


def _compare_steps(
    engine: Engine[QueriesToLoss], momentum: MomentumEncoder, device: torch.device
) -> Errors:
    """Compare each step with `plain_step`, which starts from the state of the real one."""
    errors, lamb = Errors(), plain_step.Lamb(_LR, _DECAY)
    backbone = BaseEncoder(_SHAPE).backbone.double()
    witness = Witness(engine)
    for step in range(_STEPS):
        base = _in_fp64(full_tensors(engine.module.base))
        keys = _in_fp64(momentum.full_state())
        trained = {n for n, p in engine.module.base.named_parameters() if p.requires_grad}
        result = train_step(witness, momentum, *rank_views(step, device), momentum=MOMENTUM)
        # the momentum encoder moves from the weights before the step (the paper's order)
        moved = plain_step.move_encoder(keys, base, trained & {*keys}, MOMENTUM)
        new_keys = _in_fp64(momentum.full_state())
        averaged = [n for n in moved if "running_" not in n and "num_batches" not in n]
        leaves = {n: t.clone().requires_grad_(n in trained) for n, t in base.items()}
        loss = plain_step.batch_loss(backbone, leaves, moved, *_global_views(step), _TEMPERATURE)
        torch.autograd.backward(loss)
        expected = {n: _gradient(leaves[n]) for n in sorted(trained)}
        gradients = {n.removeprefix("base."): g for n, g in witness.gradients.items()}
        matrices = {n for n in trained if vit_rule(n, tuple(base[n].shape)).adapt}
        stepped = lamb.step(base, gradients, matrices)
        weights = _in_fp64(full_tensors(engine.module.base))
        errors.keep_largest(
            loss=relative_difference(result.loss, float(loss.detach())),
            gradient=gradient_error(gradients, expected),
            lamb=max(_movement_error(weights[n], stepped[n], base[n]) for n in sorted(trained)),
            momentum=max(relative_distance(new_keys[n], moved[n], floor=1e-3) for n in averaged),
            ranks_differ=float(
                len({*ranks.gather_objects(_hash_tensors(momentum.full_state()))}) > 1
            ),
        )
    return errors


def gradient_error(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest error over tensors.

    A gradient that is zero but for rounding is compared with the norm of all gradients.

    Args:
        gradients: gradient of each tensor by name, as it was computed.
        expected: what they should be, by the same names.
    """
    total_norm = float(torch.stack([g.norm() for g in expected.values()]).norm())
    return max(
        relative_distance(gradients[n], g, floor=1e-2 * total_norm) for n, g in expected.items()
    )


def _movement_error(present: Tensor, expected: Tensor, start: Tensor) -> float:
    """Difference relative to the distance that the tensor moved."""
    return float((present - expected).norm() / (expected - start).norm().clamp_min(1e-300))


class Witness:
    """An engine that copies its reduced gradients before each step."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, *arguments: Any) -> Any:
        """The forward pass."""
        return self._engine(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> None:
        """The optimizer's step, behind the copy."""
        self.gradients = _in_fp64(full_gradients(self._engine.module))
        self._engine.step()


def start_network(
    stage: int, device: torch.device
) -> tuple[Engine[QueriesToLoss], MomentumEncoder]:
    """Engine with LAMB, and momentum encoder; the same numbers at each call."""
    torch.manual_seed(0)
    base, momentum = BaseEncoder(_SHAPE), MomentumEncoder(_SHAPE, device=device)
    for head in (base.projector, base.predictor, momentum.projector):
        _replace_relu(head)
    model = QueriesToLoss(base, ContrastiveLoss(_TEMPERATURE)).to(device)
    optimizer = Lamb(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        lr=_LR,
        weight_decay=_DECAY,
    )
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:  # shard the small tensors as well
        zero["stage3_param_persistence_threshold"] = 0
    batch = _rank_batch() * ranks.world_size()
    config = engine_config(
        {"zero_optimization": zero}, global_batch=batch, world_size=ranks.world_size()
    )
    engine = start_engine(model, optimizer, config)
    momentum.start_from(dict(full_tensors(engine.module.base)))
    momentum.follow(engine.module.base)
    return engine, momentum


def _replace_relu(head: nn.Module) -> None:
    for name, child in list(head.named_children()):
        if isinstance(child, nn.ReLU):
            setattr(head, name, nn.Softplus())


def _rank_batch() -> int:
    """Number of rows of a rank."""
    return max(4, 8 // ranks.world_size())


def _global_views(step: int) -> tuple[Tensor, Tensor]:
    """Both views of the global batch (G, C, H, W), fp64 on the CPU."""
    generator = torch.Generator().manual_seed(step)
    size = _SHAPE.vit.image_size
    batch = _rank_batch() * ranks.world_size()
    first, second = (torch.randn(batch, 3, size, size, generator=generator) for _ in range(2))
    return first.double(), second.double()


def rank_views(step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows of this rank (B, C, H, W) in both views, fp32 on the device."""
    rows = slice(ranks.rank() * _rank_batch(), (ranks.rank() + 1) * _rank_batch())
    first, second = (x_GCHW[rows].float().to(device) for x_GCHW in _global_views(step))
    return first, second


def _in_fp64(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Copies of the tensors on the CPU, fp64."""
    return {name: tensor.detach().cpu().double().clone() for name, tensor in tensors}


def _hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
