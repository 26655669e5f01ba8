"""A model whose layers take part now and then, trained under DeepSpeed beside plain fp64.

Everything here runs on a rank of `tests.ranks_pool.run_ranks`.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.optim.rules import vit_rule
from tests.optim import engines, plain
from tests.reference import adamw_step

STEPS = 7
BATCH = 8
FREEZE_AT = 4
LAYERS = ("always", "alternating", "first", "last", "changing", "once", "never", "frozen")


@dataclass(frozen=True)
class AbsentCase:
    """One configuration of engine and optimizer."""

    stage: int
    accumulate: int = 1
    offload: bool = False
    optimizer: str = "lamb"
    precision: str = "fp32"
    clip: float = 0.0
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def engine_case(self) -> engines.Case:
        """The same, as `engines` takes it."""
        offload = {"offload_optimizer": {"device": "cpu"}} if self.offload else {}
        return engines.Case(
            self.stage,
            self.precision,
            self.optimizer,
            zero=offload | self.zero,
            config=self.config,
            clip=self.clip,
            accumulate=self.accumulate,
        )


def takes_part(layer: str, step: int, micro: int, accumulate: int) -> bool:
    """Whether a layer is used in a micro-batch of a step."""
    return {
        "always": True,
        "alternating": step % 2 == 1,
        "first": micro == 0,
        "last": micro == accumulate - 1,
        "changing": micro == step % accumulate and step != 3,
        "once": step == 1,
        "never": False,
        "frozen": True,
    }[layer]


class Branches(nn.Module):
    """Two layers that are always used around those that are used now and then; odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(11, 7)
        self.layers = nn.ModuleDict({name: nn.Linear(7, 7) for name in LAYERS})
        self.leave = nn.Linear(7, 5)

    def forward(self, x: Tensor, used: Sequence[str]) -> Tensor:
        h = torch.tanh(self.enter(x))
        for name in used:
            h = h + torch.tanh(self.layers[name](h))
        return self.leave(h)


def make_branches() -> Branches:
    """The model with the same weights on each call; scales differ by tensor."""
    generator = torch.Generator().manual_seed(3)
    model = Branches()
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            scale = 10.0 ** (index % 3 - 1) * 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def micro_batches(accumulate: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The whole batch of all ranks, cut into micro-batches, step by step."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 11, generator=generator)
        y = torch.randint(0, 5, (BATCH,), generator=generator)
        yield list(zip(x.chunk(accumulate), y.chunk(accumulate), strict=True))


def used_layers(step: int, micro: int, accumulate: int) -> list[str]:
    return [name for name in LAYERS if takes_part(name, step, micro, accumulate)]


def freeze(model: nn.Module, step: int) -> None:
    """From a certain step on one layer is frozen, though it still takes part in the loss."""
    if step == FREEZE_AT:
        for name, parameter in model.named_parameters():
            if "frozen" in name:
                parameter.requires_grad_(False)


class Plain:
    """The formulas in fp64 on whole tensors; what has no gradient stays as it is."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self.model = make_branches().double()
        self.kind, self.options = kind, options
        self.moments: dict[str, list[Tensor]] = {
            name: [torch.zeros_like(p), torch.zeros_like(p)]
            for name, p in self.model.named_parameters()
        }
        self.steps = 0
        self.updates = dict.fromkeys(self.moments, 0)

    def train(self, accumulate: int, clip: float) -> None:
        for step, batches in enumerate(micro_batches(accumulate)):
            freeze(self.model, step)
            self.model.zero_grad()
            for micro, (x, y) in enumerate(batches):
                out = self.model(x.double(), used_layers(step, micro, accumulate))
                (nn.functional.cross_entropy(out, y) / accumulate).backward()
            present = {n: p for n, p in self.model.named_parameters() if p.grad is not None}
            if clip:
                norm = torch.stack([p.grad.norm() for p in present.values()]).norm()  # type: ignore[union-attr]
                for parameter in present.values():
                    parameter.grad /= max(1.0, (float(norm) + 1e-6) / clip)
            self.steps += 1
            for name, parameter in present.items():
                self.updates[name] += 1
                with torch.no_grad():
                    self._move(name, parameter)

    def _move(self, name: str, w: Tensor) -> None:
        rule, g = vit_rule(name, tuple(w.shape)), w.grad
        lr, wd = self.options["lr"], self.options["weight_decay"] * rule.decay
        m, v = self.moments[name]
        assert g is not None
        if self.kind == "lamb":  # counts the steps of the optimizer, as timm and apex do
            new, m, v = plain.lamb_step(w, g, m, v, self.steps, lr=lr, wd=wd, adapt=rule.adapt)
        elif self.kind == "adamw":  # counts the tensor's own, as torch does
            new, m, v = adamw_step(w, g, m, v, self.updates[name], lr=lr, wd=wd)
        else:
            new, m = plain.lars_step(w, g, m, lr=lr, wd=wd, adapt=rule.adapt)
        w.copy_(new)
        self.moments[name] = [m, v]


def start_branches(case: AbsentCase) -> tuple[Any, Any, dict[str, Any]]:
    """Engine, attached optimizer, and the options that it was made with."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    engines.quiet()
    options: dict[str, Any] = {"lr": engines.RATES[case.optimizer] / 2, "weight_decay": 0.1}
    model, config = make_branches(), engines.ds_config(case.engine_case)
    config["train_micro_batch_size_per_gpu"] = BATCH // ranks.world_size() // case.accumulate
    optimizer = engines.OPTIMIZERS[case.optimizer](model.named_parameters(), **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.attach(engine)
    return engine, optimizer, options


def train_unequally(stage: int) -> Any:
    """Layers that moved after steps in which each rank used another one, or the refusal."""
    engine, optimizer, _ = start_branches(AbsentCase(stage))
    first = engines.weights(optimizer)
    x, y = torch.ones(BATCH // ranks.world_size(), 11), torch.arange(BATCH // ranks.world_size())
    try:
        for _ in range(2):
            out = engine(x, ["always", ("first", "last")[ranks.rank()]])
            engine.backward(nn.functional.cross_entropy(out, y % 5))
            engine.step()
    except ValueError as error:
        return str(error)
    moved = {n for n, w in engines.weights(optimizer).items() if not torch.equal(w, first[n])}
    engines.stop(engine)
    return sorted({name.split(".")[1] for name in moved if name.startswith("layers.")})


def compare_absent(case: AbsentCase) -> dict[str, Any]:
    """Errors of the engine's weights, and which tensors moved without a gradient."""
    engine, optimizer, options = start_branches(case)
    first = engines.weights(optimizer)
    dtype = engines.DTYPES[case.precision]
    moved = set()
    for step, batches in enumerate(micro_batches(case.accumulate)):
        freeze(engine.module, step)
        before = engines.weights(optimizer)
        present = {"always", "enter", "leave"}
        for micro, (x, y) in enumerate(batches):
            used = used_layers(step, micro, case.accumulate)
            present |= {*used} - ({"frozen"} if step >= FREEZE_AT else set())
            rows = torch.arange(len(x)).view(ranks.world_size(), -1)[ranks.rank()]
            loss = nn.functional.cross_entropy(engine(x[rows].to(dtype), used).float(), y[rows])
            engine.backward(loss)
            engine.step()
        after = engines.weights(optimizer)
        for name in after:
            if not torch.equal(before[name], after[name]) and not present & {*name.split(".")}:
                moved.add((step, name))
    witness = Plain(case.optimizer, options)
    witness.train(case.accumulate, case.clip)
    want = {n: p.detach() for n, p in witness.model.named_parameters()}
    errors = {
        n: float(
            (after[n].double() - want[n]).norm() / (want[n] - first[n]).norm().clamp_min(1e-12)
        )
        for n in want
    }
    engines.stop(engine)
    return {"errors": errors, "moved": moved, "worst": max(errors.values())}


def compare_all(cases: Sequence[AbsentCase]) -> list[dict[str, Any]]:
    """`compare_absent` of each case, in one set of processes."""
    return [compare_absent(case) for case in cases]
