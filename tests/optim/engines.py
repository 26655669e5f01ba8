"""Train `OddModel` under DeepSpeed beside a plain optimizer that is fed the same reduced gradients.

Everything here runs on a rank of `tests.ranks_pool.run_ranks`.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.optim import AdamW, Lamb
from mocov3_ds.optim.rules import Rule
from tests.optim import plain

STEPS = 11
BATCH = 12
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def rule(name: str, shape: tuple[int, ...]) -> Rule:
    """Different for nearly each tensor, so that a mix-up shows."""
    matrix = len(shape) > 1
    fast = 2.0 if name == "out.weight" else 1.0
    decay = 0.5 if name == "narrow.weight" else float(matrix)
    return Rule(decay=decay, lr_multiplier=fast, adapt=matrix)


def adapt_all(name: str, shape: tuple[int, ...]) -> Rule:
    """Every tensor adapts, also the one of one element."""
    return Rule(decay=float(len(shape) > 1), adapt=True)


OPTIMIZERS: dict[str, Callable[..., Any]] = {"lamb": Lamb, "adamw": AdamW}


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


def start(case: Case, rule_for: Any = rule) -> tuple[Any, Any]:
    """Engine and attached optimizer of a case."""
    quiet()
    model = plain.OddModel()
    options = {"lr": 5e-3, "weight_decay": 0.1} | case.options
    optimizer = OPTIMIZERS[case.optimizer](model.named_parameters(), rule=rule_for, **options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(case))
    optimizer.attach(engine)
    return engine, optimizer


def batches(case: Case, steps: int, seed: int = 1) -> Any:
    """(x, y) micro-batches of this rank, step by step, out of a batch that knows no ranks."""
    generator = torch.Generator().manual_seed(seed)
    dtype = DTYPES[case.precision]
    for _ in range(steps):
        x = torch.randn(BATCH, 11, generator=generator)
        y = torch.randint(0, 5, (BATCH,), generator=generator)
        mine = torch.arange(BATCH).view(case.accumulate, ranks.world_size(), -1)
        yield [(x[i].to(dtype), y[i]) for i in mine[:, ranks.rank()]]


def backward(engine: Any, x: Tensor, y: Tensor) -> float:
    loss = torch.nn.functional.cross_entropy(engine(x).float(), y)
    engine.backward(loss)
    return float(loss.detach())


def train(engine: Any, case: Case, steps: int = STEPS, seed: int = 1) -> None:
    """Steps without a witness."""
    for micro_batches in batches(case, steps, seed):
        for x, y in micro_batches:
            backward(engine, x, y)
            engine.step()


def weights(optimizer: Any) -> dict[str, Tensor]:
    """Full fp32 masters by name."""
    return {name: state["weight"].clone() for name, state in optimizer.full_state()}


def stop(engine: Any) -> None:
    """Give an engine's hooks and memory back."""
    engine.destroy()
    gc.collect()


def movement_error(
    ours: dict[str, Tensor], want: dict[str, Tensor], first: dict[str, Tensor]
) -> float:
    """Largest error of any tensor relative to how far it moved."""
    errors = [
        float((ours[n] - want[n]).norm() / (want[n] - first[n]).norm().clamp_min(1e-30))
        for n in want
    ]
    return max(error if error == error else float("inf") for error in errors)


class Witness:
    """Plain whole-tensor optimizers beside the engine: the written-out formula, and a library's."""

    def __init__(self, case: Case, optimizer: Any, rule_for: Any) -> None:
        self.case, self.rule_for, self.group = case, rule_for, optimizer.param_groups[0]
        self.w = weights(optimizer)
        self.first = {n: w.clone() for n, w in self.w.items()}
        self.m = {n: torch.zeros_like(w) for n, w in self.w.items()}
        self.v = {n: torch.zeros_like(w) for n, w in self.w.items()}
        self.t = 0

    def step(self, gradients: dict[str, Tensor]) -> None:
        self.t += 1
        for n, g in gradients.items():
            rule_n = self.rule_for(n, tuple(g.shape))
            common = {
                "lr": self.group["lr"] * rule_n.lr_multiplier,
                "wd": self.group["weight_decay"] * rule_n.decay,
            }
            if self.case.optimizer == "lamb":
                self.w[n], self.m[n], self.v[n] = plain.lamb_step(
                    self.w[n], g, self.m[n], self.v[n], self.t, adapt=rule_n.adapt, **common
                )
            if self.case.optimizer == "adamw":
                from tests import reference

                self.w[n], self.m[n], self.v[n] = reference.adamw_step(
                    self.w[n], g, self.m[n], self.v[n], self.t, **common
                )


def compare(case: Case, rule_for: Any = rule) -> dict[str, Any]:
    """Errors of the engine's weights and moments against the witness."""
    engine, optimizer = start(case, rule_for)
    witness = Witness(case, optimizer, rule_for)
    named = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    for micro_batches in batches(case, STEPS):
        for index, (x, y) in enumerate(micro_batches):
            backward(engine, x, y)
            if index == len(micro_batches) - 1:
                gradients = {
                    n: safe_get_full_grad(p).detach().float().clone().view(witness.w[n].shape)
                    for n, p in named.items()
                }
                scale = engine.optimizer.loss_scale if case.precision == "fp16" else 1.0
            engine.step()
        if getattr(engine.optimizer, "overflow", False):
            continue
        gradients = {n: g / scale for n, g in gradients.items()}
        if case.clip:
            norm = torch.sqrt(sum(g.double().square().sum() for g in gradients.values()))
            factor = max(1.0, float((norm + 1e-6) / case.clip))
            gradients = {n: g / factor for n, g in gradients.items()}
        witness.step(gradients)
    state = dict(optimizer.full_state())
    result = {
        "wrapper": type(engine.optimizer).__name__,
        "weights": movement_error(
            {n: s["weight"] for n, s in state.items()}, witness.w, witness.first
        ),
        "m": max(
            float((s["exp_avg"] - witness.m[n]).norm() / witness.m[n].norm().clamp_min(1e-30))
            for n, s in state.items()
        ),
        "v": max(
            float((s["exp_avg_sq"] - witness.v[n]).norm() / witness.v[n].norm().clamp_min(1e-30))
            for n, s in state.items()
        ),
        "steps": optimizer.step_count,
        "done": witness.t,
        "ratios": optimizer.signals().trust_ratio_S.tolist(),
    }
    stop(engine)
    return result
