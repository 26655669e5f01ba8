"""The trainer does what the paper says: rates, decay and momentum of every tensor, step by step.

A real run of one rank is built and advanced. The weights after each step are compared with the
paper's formulas, written plainly here, from the weights and gradients that the optimizer was given.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mocov3_ds.recipes import parse
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL

Tensors = dict[str, Tensor]

STEPS = 8
BATCH, EPOCHS, WARMUP_EPOCHS, STEPS_PER_EPOCH = 16, 4, 1, 3  # as SMALL says, of 50 samples
TOTAL, WARMUP = EPOCHS * STEPS_PER_EPOCH, WARMUP_EPOCHS * STEPS_PER_EPOCH
BASE_RATE, DECAY, BETA1, BETA2, MOMENTUM = 1.5e-3, 0.1, 0.9, 0.99, 0.97
EPS = {"AdamW": 1e-8, "Lamb": 1e-6}


@dataclass
class Trace:
    """What was seen of one step, in fp64."""

    lr: float
    momentum: float
    weights: Tensors
    """of the base encoder before the step"""
    gradients: Tensors
    stepped: Tensors
    """weights after the step"""
    keys: Tensors
    """weights of the momentum encoder before the step"""
    moved_keys: Tensors


def trace_run(folder: Path, flags: list[str]) -> list[Trace]:
    """Advance a run and look at each step; ZeRO stage 0 hands the optimizer whole tensors."""
    run = build_run(parse([*flags, "--runs", str(folder / "runs")]), torch.device("cpu"))
    base = dict(run.base.named_parameters())
    keys = dict(run.momentum_encoder.named_parameters())
    optimizer_step, traces = run.optimizer.step, []
    with torch.no_grad():  # biases and class token start at (about) 0, where a decay does not show
        for name, parameter in base.items():
            if parameter.requires_grad and not is_matrix(name, parameter):
                parameter.add_(0.3 * torch.randn_like(parameter))
    gradients: Tensors = {}

    def step() -> None:
        gradients.update(
            {n: p.grad.double().clone() for n, p in base.items() if p.grad is not None}
        )
        optimizer_step()

    run.optimizer.step = step  # type: ignore[method-assign, assignment]
    for _ in range(STEPS):
        weights, before = copies(base), copies(keys)
        done = advance_run(run)
        traces.append(
            Trace(
                done.lr, done.momentum, weights, dict(gradients), copies(base), before, copies(keys)
            )
        )
    run.close()
    return traces


def copies(tensors: dict[str, torch.nn.Parameter]) -> Tensors:
    return {name: tensor.detach().double().clone() for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------ the formulas


def learning_rate(step: int) -> float:
    """Per 256 images; linear from 0 over the warm-up, then half a cosine."""
    peak = BASE_RATE * BATCH / 256
    if step < WARMUP:
        return peak * step / WARMUP
    return peak * (1 + math.cos(math.pi * (step - WARMUP) / (TOTAL - WARMUP))) / 2


def encoder_momentum(step: int) -> float:
    """From its first value to 1 along half a cosine."""
    return 1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * step / TOTAL)) / 2


def is_matrix(name: str, weight: Tensor) -> bool:
    return weight.dim() > 1 and name != "backbone.cls_token"


@dataclass
class Adam:
    """Direction of AdamW and LAMB, one tensor at a time."""

    eps: float
    steps: int = 0

    def __post_init__(self) -> None:
        self.first: Tensors = {}
        self.second: Tensors = {}

    def directions(self, gradients: Tensors) -> Tensors:
        self.steps += 1
        out = {}
        for name, gradient in gradients.items():
            zero = torch.zeros_like(gradient)
            m = BETA1 * self.first.get(name, zero) + (1 - BETA1) * gradient
            v = BETA2 * self.second.get(name, zero) + (1 - BETA2) * gradient**2
            self.first[name], self.second[name] = m, v
            m_hat, v_hat = m / (1 - BETA1**self.steps), v / (1 - BETA2**self.steps)
            out[name] = m_hat / (v_hat.sqrt() + self.eps)
        return out


@dataclass(frozen=True)
class Recipe:
    """Flags of a run, and what they mean for a tensor."""

    flags: tuple[str, ...] = ()
    optimizer: str = "AdamW"
    decay_all: bool = True
    rates: tuple[tuple[str, float], ...] = ()
    """beginning of a name -> learning rate relative to the others; the longest counts"""
    trained_patches: bool = False

    def rate(self, name: str) -> float:
        found = [rate for start, rate in self.rates if name.startswith(start)]
        return found[0] if found else 1.0

    def moved(self, name: str, weight: Tensor, direction: Tensor, lr: float) -> Tensor:
        """A tensor after its step."""
        matrix = is_matrix(name, weight)
        decay = DECAY if matrix or self.decay_all else 0.0
        update = direction + decay * weight
        ratio = 1.0
        if self.optimizer == "Lamb" and matrix and weight.norm() > 0 and update.norm() > 0:
            ratio = float(weight.norm() / update.norm())
        return weight - lr * self.rate(name) * ratio * update


RECIPES = {
    "the paper's": Recipe(),
    "decay of matrices alone": Recipe(("--decay", "matrices"), decay_all=False),
    "rates of groups": Recipe(
        (
            *("--model.patch_lr", "0.5", "--model.group_lr", "patch_embed=0.4"),
            *("--model.group_lr", "block_1=3", "--model.group_lr", "predictor=0.25"),
        ),
        rates=(("backbone.patch_embed.", 0.2), ("backbone.blocks.1.", 3.0), ("predictor.", 0.25)),
        trained_patches=True,
    ),
    "LAMB": Recipe(("--ds", "optimizer.type=Lamb"), optimizer="Lamb"),
    "LAMB, decay of matrices alone": Recipe(
        ("--ds", "optimizer.type=Lamb", "--decay", "matrices"), optimizer="Lamb", decay_all=False
    ),
}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run on a training set of 50 samples."""
    folder = str(tmp_path_factory.mktemp("shards") / "train")
    assert SMALL[:6] == ["--batch", "16", "--epochs", "4", "--warmup_epochs", "1"]
    make_set(folder, [20, 7, 23])
    settings = {
        "zero_optimization.stage": 0,
        "optimizer.params.lr": BASE_RATE,
        "optimizer.params.betas": [BETA1, BETA2],
        "optimizer.params.weight_decay": DECAY,
    }
    ds = [word for key, value in settings.items() for word in ("--ds", f"{key}={value}")]
    data = ["--data.shards", folder, "--knn.probes", "0", "--save.every_steps", "99"]
    return [*SMALL, *data, "--moco.momentum", str(MOMENTUM), *ds]


@pytest.mark.parametrize("name", RECIPES)
def test_each_tensor_moves_by_the_papers_formulas(
    tmp_path: Path, flags: list[str], name: str
) -> None:
    recipe = RECIPES[name]
    [traces] = run_ranks(1, trace_run, tmp_path, [*flags, *recipe.flags])
    adam = Adam(EPS[recipe.optimizer])
    for step, trace in enumerate(traces):
        assert trace.lr == pytest.approx(learning_rate(step), rel=1e-12)
        assert trace.momentum == pytest.approx(encoder_momentum(step), rel=1e-12)
        frozen = {*trace.weights} - {*trace.gradients}
        patches = {f"backbone.patch_embed.proj.{kind}" for kind in ("weight", "bias")}
        assert frozen == {"backbone.pos_embed"} | (set() if recipe.trained_patches else patches)
        for tensor in frozen:
            assert torch.equal(trace.stepped[tensor], trace.weights[tensor]), tensor
            assert torch.equal(trace.moved_keys[tensor], trace.weights[tensor]), tensor
        directions = adam.directions(trace.gradients)
        for tensor, direction in directions.items():
            weight = trace.weights[tensor]
            expected = recipe.moved(tensor, weight, direction, learning_rate(step))
            assert_moved(trace.stepped[tensor], expected, weight, (name, step, tensor))
        for tensor in {*trace.keys} - frozen:
            key, m = trace.keys[tensor], encoder_momentum(step)
            expected = m * key + (1 - m) * trace.weights[tensor]
            assert_moved(trace.moved_keys[tensor], expected, key, (name, step, tensor, "momentum"))
    moved = [t for t in traces[-1].gradients if not torch.equal(*both_ends(traces, t))]
    assert {*moved} == {*traces[-1].gradients}  # not one trained tensor stands still


def both_ends(traces: list[Trace], name: str) -> tuple[Tensor, Tensor]:
    return traces[0].weights[name], traces[-1].stepped[name]


def assert_moved(ours: Tensor, expected: Tensor, start: Tensor, what: tuple[object, ...]) -> None:
    """fp32 against fp64: half a unit in the last place of the weight, and 1e-4 of the movement."""
    rounding = 2**-23 * start.abs() + 1e-12
    allowed = rounding + 1e-4 * (expected - start).abs()
    assert bool(((ours - expected).abs() <= allowed).all()), what
