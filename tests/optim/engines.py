"""Train `OddModel` under DeepSpeed beside plain optimizers that are fed the same reduced gradients.

Everything here runs on a rank of `tests.ranks_pool.run_ranks`.
"""

import contextlib
import gc
import json
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import timm.optim
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.optim import AdamW, Lamb, Lars, Muon
from mocov3_ds.optim.rules import Rule, RuleFor
from tests import reference
from tests.optim import plain

STEPS = 11
BATCH = 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OPTIMIZERS: dict[str, Any] = {"lamb": Lamb, "adamw": AdamW, "lars": Lars, "muon": Muon}
RATES = {"lamb": 2e-2, "adamw": 0.1, "lars": 4.0, "muon": 0.1}
HIDDEN = ("wide.weight", "narrow.weight")  # by Muon; out.weight is the last layer


@dataclass(frozen=True)
class Case:
    """One configuration of engine and optimizer."""

    stage: int
    precision: str = "fp32"
    optimizer: str = "lamb"
    options: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    clip: float = 0.0
    accumulate: int = 1
    sharded_init: bool = False

    def __str__(self) -> str:
        parts = [f"stage {self.stage}", self.precision, self.optimizer]
        parts += [json.dumps(x) for x in (self.options, self.zero, self.config) if x]
        parts += ["clip"] * bool(self.clip) + ["accumulate"] * (self.accumulate > 1)
        parts += ["zero.Init"] * self.sharded_init
        return " ".join(parts)


def rule(name: str, shape: tuple[int, ...]) -> Rule:
    """Different for nearly each tensor, so that a mix-up shows."""
    matrix = len(shape) > 1
    fast = 2.0 if name == "out.weight" else 1.0
    decay = 0.5 if name == "narrow.weight" else float(matrix)
    return Rule(decay=decay, lr_multiplier=fast, adapt=matrix)


def quiet() -> None:
    """Skip DeepSpeed's minute-long compilation, and let it believe in fp16 on the CPU."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().is_fp16_supported = lambda: True


def ds_config(case: Case) -> dict[str, Any]:
    """DeepSpeed config of a case; buckets are small so that many are used."""
    zero: dict[str, Any] = {"stage": case.stage}
    if case.stage:
        zero |= {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    if case.stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 500}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH // ranks.world_size() // case.accumulate,
        "gradient_accumulation_steps": case.accumulate,
        "gradient_clipping": case.clip,
        "zero_optimization": zero | case.zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    if case.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if case.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8}
    return config | case.config


def start(case: Case, rule_for: RuleFor = rule) -> tuple[Any, Any]:
    """Engine and attached optimizer of a case."""
    engine, optimizer = start_unattached(case, rule_for)
    optimizer.attach(engine)
    return engine, optimizer


def start_unattached(case: Case, rule_for: RuleFor = rule) -> tuple[Any, Any]:
    quiet()
    config = ds_config(case)
    model = sharded_model(case, config) if case.sharded_init else plain.odd_model()
    # rates at which 11 steps move each tensor far enough to stand out of fp32's rounding
    options = {"lr": RATES[case.optimizer], "weight_decay": 0.1} | case.options
    optimizer = OPTIMIZERS[case.optimizer](model.named_parameters(), rule=rule_for, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def sharded_model(case: Case, config: dict[str, Any]) -> torch.nn.Module:
    """The same model, cut over the ranks while it is made."""
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = plain.OddModel()
    named = dict(model.named_parameters())
    values = plain.odd_values({name: tuple(p.ds_shape) for name, p in named.items()})
    for name, parameter in named.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(values[name])
    return model


def stop(engine: Any) -> None:
    """Give an engine's hooks and memory back."""
    engine.destroy()
    gc.collect()


Batch = tuple[Tensor, Tensor]


def batches(case: Case, steps: int, seed: int = 1) -> Iterator[list[Batch]]:
    """(x, y) micro-batches of this rank, step by step, out of a batch that knows no ranks."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.precision]
    for _ in range(steps):
        x = torch.randn(BATCH, 11, generator=generator)
        y = torch.randint(0, 5, (BATCH,), generator=generator)
        rank_rows = torch.arange(BATCH).view(case.accumulate, ranks.world_size(), -1)
        yield [(x[i].to(dtype), y[i]) for i in rank_rows[:, ranks.rank()]]


def backward(engine: Any, x: Tensor, y: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(engine(x).float(), y)
    engine.backward(loss)
    return float(loss.detach())


def train(engine: Any, data: Sequence[list[Batch]] | Iterator[list[Batch]]) -> None:
    """Steps without a witness."""
    for micro_batches in data:
        for x, y in micro_batches:
            backward(engine, x, y)
            engine.step()


def weights(optimizer: Any) -> dict[str, Tensor]:
    """Full fp32 masters by name."""
    return {name: state["weight"].clone() for name, state in optimizer.full_state("weight")}


class Witness:
    """Whole-tensor optimizers beside the engine: the written-out formula, and a library's."""

    def __init__(self, case: Case, optimizer: Any, rule_for: RuleFor) -> None:
        self.case = case
        self.options = dict(optimizer.param_groups[0])
        self.first = weights(optimizer)
        self.w = {n: w.clone() for n, w in self.first.items()}
        self.m = {n: torch.zeros_like(w) for n, w in self.w.items()}
        self.v = {n: torch.zeros_like(w) for n, w in self.w.items()}
        self.ratio: dict[str, float] = {}
        self.rules = {n: rule_for(n, tuple(w.shape)) for n, w in self.w.items()}
        self.t = 0
        self.library = {n: torch.nn.Parameter(w.clone()) for n, w in self.first.items()}
        hidden = [n for n in self.rules if case.optimizer == "muon" and n in HIDDEN]
        self.library_optimizers = [self._library_optimizer({*self.rules} - {*hidden})]
        if hidden:
            self.library_optimizers.append(self._library_optimizer(hidden))

    def _library_optimizer(self, names: Collection[str]) -> torch.optim.Optimizer:
        """Options that timm spells as ours; differences are spelled out in test_lamb.py."""
        groups = [
            {
                "params": [self.library[n]],
                "lr": self.options["lr"] * rule_n.lr_multiplier,
                "weight_decay": self.options["weight_decay"] * rule_n.decay,
            }
            for n, rule_n in self.rules.items()
            if n in names
        ]
        if {*names} <= {*HIDDEN}:
            scale = self.options["adjust"]
            return torch.optim.Muon(groups, momentum=self.options["momentum"], adjust_lr_fn=scale)
        if self.case.optimizer == "lamb":
            always = self.options["always_adapt"]
            return timm.optim.Lamb(groups, max_grad_norm=None, always_adapt=always, foreach=False)
        if self.case.optimizer == "lars":
            return timm.optim.Lars(groups, momentum=self.options["momentum"])
        return torch.optim.AdamW(groups, eps=self.options["eps"])

    def step(self, gradients: dict[str, Tensor]) -> None:
        self.t += 1
        for n, g in gradients.items():
            self.library[n].grad = g.clone()
            self._plain_step(n, g)
        for optimizer in self.library_optimizers:
            optimizer.step()

    def _plain_step(self, n: str, g: Tensor) -> None:
        rule_n = self.rules[n]
        lr = self.options["lr"] * rule_n.lr_multiplier
        wd = self.options["weight_decay"] * rule_n.decay
        if self.case.optimizer == "muon" and n in HIDDEN:
            self.w[n], self.m[n] = plain.muon_step(
                self.w[n], g, self.m[n], lr=lr, wd=wd, dtype=self.options["ns_dtype"]
            )
            return
        if self.case.optimizer in ("adamw", "muon"):
            self.w[n], self.m[n], self.v[n] = reference.adamw_step(
                self.w[n], g, self.m[n], self.v[n], self.t, lr=lr, wd=wd
            )
            return
        adapt = rule_n.adapt or self.options["always_adapt"]
        if self.case.optimizer == "lamb":
            self.w[n], self.m[n], self.v[n] = plain.lamb_step(
                self.w[n], g, self.m[n], self.v[n], self.t, lr=lr, wd=wd, adapt=adapt
            )
        else:
            self.w[n], self.m[n] = plain.lars_step(
                self.w[n], g, self.m[n], lr=lr, wd=wd, adapt=adapt
            )


def largest_error(
    ours: dict[str, Tensor], expected: dict[str, Tensor], scale: dict[str, Tensor]
) -> float:
    """max over tensors of |ours - expected| / |scale|; what is not finite is infinitely wrong."""
    errors = [
        float((ours[n] - expected[n]).norm() / scale[n].norm().clamp_min(1e-30)) for n in expected
    ]
    return max(error if error == error else float("inf") for error in errors)


def movement_error(
    ours: dict[str, Tensor], expected: dict[str, Tensor], first: dict[str, Tensor]
) -> float:
    """Largest error of any tensor relative to how far it moved."""
    return largest_error(ours, expected, {n: expected[n] - first[n] for n in expected})


def compare(case: Case, rule_for: RuleFor = rule) -> dict[str, Any]:
    """Errors of the engine's weights and moments against the witnesses."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    engine, optimizer = start(case, rule_for)
    witness = Witness(case, optimizer, rule_for)
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    for micro_batches in batches(case, STEPS):
        for x, y in micro_batches[:-1]:
            backward(engine, x, y)
            engine.step()
        backward(engine, *micro_batches[-1])
        scale = engine.optimizer.loss_scale if case.precision == "fp16" else 1.0
        gradients = {n: _full_gradient(p, witness.w[n].shape) for n, p in named.items()}
        engine.step()
        if not getattr(engine.optimizer, "overflow", False):
            witness.step(_clipped({n: g / scale for n, g in gradients.items()}, case.clip))
    state = dict(optimizer.full_state())
    ours = {n: s["weight"] for n, s in state.items()}
    first = optimizer.moments[0]
    signals = optimizer.signals().rows()
    result = {
        "case": str(case),
        "wrapper": type(engine.optimizer).__name__,
        "plain": movement_error(ours, witness.w, witness.first),
        "library": movement_error(
            ours, {n: p.detach() for n, p in witness.library.items()}, witness.first
        ),
        "moment": largest_error({n: s[first] for n, s in state.items()}, witness.m, witness.m),
        "square": _square_error(state, witness.v) if len(optimizer.moments) == 2 else 0.0,
        "steps": (optimizer.step_count, witness.t),
        "signals": signals,
        "low": low_precision_error(engine, ours),
        "held": {s.name for flat in optimizer._flats.values() for s in flat.segments},
    }
    stop(engine)
    return result


def _square_error(state: dict[str, dict[str, Tensor]], v: dict[str, Tensor]) -> float:
    """Error of the second moments, where there are any; a matrix of Muon's has none."""
    squares = {n: s["exp_avg_sq"] for n, s in state.items() if "exp_avg_sq" in s}
    assert all(n in squares or not v[n].any() for n in v)
    return largest_error(squares, {n: v[n] for n in squares}, v)


def _full_gradient(parameter: Tensor, shape: torch.Size) -> Tensor:
    gradient = safe_get_full_grad(parameter)
    assert gradient is not None
    return gradient.detach().float().clone().view(shape)


def _clipped(gradients: dict[str, Tensor], clip: float) -> dict[str, Tensor]:
    if not clip:
        return gradients
    norm = float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())
    return {n: g / max(1.0, (norm + 1e-6) / clip) for n, g in gradients.items()}


def low_precision_error(engine: Any, masters: dict[str, Tensor]) -> float:
    """Whether the network's own weights are the masters, rounded: 0 if they are."""
    worst = 0.0
    for name, parameter in engine.module.named_parameters():
        if name in masters:
            gather = hasattr(parameter, "ds_id")
            with (
                deepspeed.zero.GatheredParameters([parameter])
                if gather
                else contextlib.nullcontext()
            ):
                expected = masters[name].to(parameter.dtype)
                worst = max(worst, float((parameter.detach() - expected).abs().max()))
    return worst


def errors(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """`compare` of each case, in one set of processes."""
    return [compare(case) for case in cases]
