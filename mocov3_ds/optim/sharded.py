"""What AdamW, LAMB and LARS share: rules by name, segments, signals, layout-free state.

    optimizer = Lamb(model.named_parameters(), lr=2e-3)     here: names, full shapes, rules
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.attach(engine)                                here: which segments lie on this rank

A step sweeps once over the segments (moments, direction, square sums of weight, direction and
gradient), adds the sums of all ranks in one small all-reduce, and moves the weights. Each rank
takes part in the all-reduce, also one that holds nothing but padding. With `watch` on, the same
sweep measures four more quantities a tensor, in the same all-reduce, and the largest |gradient|,
whose maximum over the ranks takes a second one of a float a tensor.

DeepSpeed calls `step` once per flat tensor (stages 1 to 3) or once for all (stage 0), and once more
with zero gradients while it is being built (stage 0, bf16); that last call changes nothing here.

Legend: S = tensors that one call of `step` updates; Q = quantities measured, see `plan`.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.segments import Flat, Segment, bits, whole
from mocov3_ds.optim.arguments import NamedParameters, full_shape, trained_tensors
from mocov3_ds.optim.kernels import BACKENDS, Kernels, kernels_for
from mocov3_ds.optim.rules import RuleFor, checked, vit_rule
from mocov3_ds.optim.step_tables import (
    AFTER,
    BEFORE,
    EVERYTHING,
    NORMS,
    PEAK,
    PRODUCT,
    Plan,
    Share,
    Signals,
    plan_of,
    signals_of,
)


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that stay exact per tensor on any sharding.

    Subclasses give `moments` (state tensors beside each weight), `_sweep` and `_move`.

    Args:
        named_parameters: `model.named_parameters()`. Frozen and empty tensors are left out.
        defaults: hyper-parameters of the one parameter group.
        rule: (name, full shape) -> `Rule`.
        backend: which kernels do the arithmetic; see `kernels`.

    Raises:
        ValueError: tensors without names, names given twice, nothing to train, complex tensors,
            an impossible rule or hyper-parameter.
    """

    moments: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        named_parameters: NamedParameters,
        defaults: dict[str, Any],
        rule: RuleFor = vit_rule,
        backend: str = "auto",
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
        trained = trained_tensors(named_parameters)
        self._names = {parameter: name for name, parameter in trained.items()}
        self._shapes = {name: full_shape(parameter) for name, parameter in trained.items()}
        self._rules = {
            name: checked(rule(name, shape), name) for name, shape in self._shapes.items()
        }
        self._backend = backend
        self.watch = False
        """whether coming steps measure gradient peaks, RMS of g / sqrt(v) and cosines as well"""
        self._flats: dict[Tensor, Flat] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._engine: Any = None
        self._meeting_place: torch.device | None = None
        super().__init__(list(trained.values()), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds a group.

        Raises:
            ValueError: on any later call.
        """
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} keeps one parameter group; give a rule(name, shape) for "
                "what differs between tensors."
            )
        super().add_param_group(param_group)

    def attach(self, engine: Any = None) -> None:
        """Learn which segments are on this rank; all ranks must call, before the first step.

        Args:
            engine: what `deepspeed.initialize` returned, given this optimizer. Without one the
                model's own parameters are updated, whole, as by any PyTorch optimizer.

        Raises:
            ValueError: an engine of another optimizer, or one under which the step cannot be exact.
        """
        flats = self._plain_flats() if engine is None else self._engine_flats(engine)
        missing = sorted({*self._shapes} - {name for flat in flats for name in flat.names})
        if missing:
            raise ValueError(
                f"{len(missing)} tensors of the optimizer are not in the engine's model, e.g. "
                f"{missing[0]!r}; build both from the same module."
            )
        for device in {flat.tensor.device for flat in flats}:
            kernels_for(self._backend, device)
        self._engine = engine
        self._flats = {flat.tensor: flat for flat in flats}
        self._plans = {}
        for flat in flats:
            # here and not at the first step: DeepSpeed links state fragments after the first
            # group's step and does not find those of the others otherwise
            state = self.state[flat.tensor]
            state.setdefault("step", 0)
            for key in self.moments:
                if key not in state:
                    state[key] = torch.zeros_like(flat.tensor, requires_grad=False)
        self._meeting_place = None if engine is None else torch.device(engine.device)

    def _plain_flats(self) -> list[Flat]:
        flats = [whole(name, parameter) for parameter, name in self._names.items()]
        for flat in flats:
            if flat.tensor.dtype != torch.float32:
                raise ValueError(
                    f"{flat.names[0]!r} is {flat.tensor.dtype}; without an engine that keeps fp32 "
                    "masters the weights themselves must be fp32."
                )
        return flats

    def _engine_flats(self, engine: Any) -> list[Flat]:
        # imported here: that room imports `optim.segments`, and needs DeepSpeed
        from mocov3_ds.distributed import zero

        if zero.base_optimizer(engine) is not self:
            raise ValueError(
                "the engine was built with another optimizer; call "
                "deepspeed.initialize(model=model, optimizer=optimizer, config=config) without an "
                "optimizer block in the config, then optimizer.attach(engine)."
            )
        return zero.layout(engine, self._names)

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming steps."""
        for group in self.param_groups:
            group["lr"] = lr

    @property
    def step_count(self) -> int:
        """Optimizer steps done; steps that fp16 skipped are not counted."""
        return max((self.state[flat]["step"] for flat in self._flats), default=0)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every tensor that DeepSpeed presents in `param_groups`.

        The gradient buffers are used as scratch space. A tensor without a gradient counts as one
        whose gradient is zero, at every stage: it took no part in the loss and still decays.

        Raises:
            ValueError: `attach` was not called, or a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            tensors = group["params"]
            if not self._flats:
                _check_nothing_to_do(tensors, type(self).__name__)
            elif any(tensor.grad is not None for tensor in tensors):
                self._step_tensors(tensors, group)
        return loss

    def _step_tensors(self, tensors: list[Tensor], group: Mapping[str, Any]) -> None:
        plan = self._plan(tensors)
        gradients = [_gradient(share.flat) for share in plan.shares]
        kernels = kernels_for(self._backend, plan.device)
        plan.rate_S = plan.multiplier_S * group["lr"]
        quantities = EVERYTHING if self.watch else self._needs(group)
        own_QS = torch.zeros(quantities, len(plan.names), device=plan.device)
        for share, gradient in zip(plan.shares, gradients, strict=True):
            self.state[share.flat.tensor]["step"] += 1
            self._sweep(kernels, share, gradient, group, own_QS, plan.rate_S)
        plan.measures_QS = self._summed(plan, own_QS)
        if self.watch:
            self._forget_undefined(plan)
        plan.ratio_S = self._ratio(plan, group, own_QS)
        for share, gradient in zip(plan.shares, gradients, strict=True):
            self._move(kernels, share, gradient, group, plan)

    @abstractmethod
    def _sweep(
        self,
        kernels: Kernels,
        share: Share,
        gradient: Tensor,
        group: Mapping[str, Any],
        sums_QS: Tensor,
        rate_S: Tensor,
    ) -> None:
        """First pass over one flat: add what it measures to `sums_QS`."""

    @abstractmethod
    def _move(
        self,
        kernels: Kernels,
        share: Share,
        gradient: Tensor,
        group: Mapping[str, Any],
        plan: Plan,
    ) -> None:
        """Second pass: move the weights, now that norms and ratios are known."""

    def _needs(self, group: Mapping[str, Any]) -> int:
        """Quantities Q that the step itself needs."""
        return NORMS

    def _ratio(self, plan: Plan, group: Mapping[str, Any], own_QS: Tensor) -> Tensor:
        """Trust ratio of each tensor, (S,); 1 unless a subclass says otherwise."""
        return torch.ones_like(plan.rate_S)

    def _adapts(self, plan: Plan) -> Tensor:
        """Whether each tensor has a factor of its own on the direction, (S,)."""
        return plan.adapt_S | bool(self.param_groups[0]["always_adapt"])

    def _forget_undefined(self, plan: Plan) -> None:
        """NaN instead of what has no meaning: RMS without v, v before the first step."""
        if "exp_avg_sq" not in self.moments:
            plan.measures_QS[AFTER:PRODUCT] = torch.nan
        elif self.step_count == 1:
            plan.measures_QS[BEFORE] = torch.nan

    def _views(self, share: Share) -> tuple[Tensor, ...]:
        """Weights and moments of a flat, each as one dimension."""
        state = self.state[share.flat.tensor]
        return share.flat.view(), *(share.flat.view(state[key]) for key in self.moments)

    def _plan(self, tensors: list[Tensor]) -> Plan:
        key = tuple(id(tensor) for tensor in tensors)
        if key not in self._plans:
            self._plans[key] = plan_of([self._flats[tensor] for tensor in tensors], self._rules)
        return self._plans[key]

    def _summed(self, plan: Plan, own_QS: Tensor) -> Tensor:
        """Add the sums of the other ranks; whether to is a fact that all ranks share."""
        shards = [share.flat for share in plan.shares if share.flat.sharded]
        if not shards:
            return own_QS.clone()
        assert all(flat.group is shards[0].group for flat in shards) and len(shards) == len(
            plan.shares
        ), "one call of step updates tensors of one process group"
        there = own_QS.to(self._meeting_place or own_QS.device, copy=True)
        ranks.all_reduce_sum(there[:PEAK], shards[0].group)
        if len(there) > PEAK:
            ranks.all_reduce_max(there[PEAK], shards[0].group)
        return there.to(own_QS.device)

    def signals(self) -> Signals | None:
        """What the last step measured, without communication; None before the first."""
        plans = list(self._plans.values())
        if not plans:
            return None
        return signals_of(plans, list(self._shapes), [self._adapts(plan) for plan in plans])

    def grad_norm(self) -> float:
        """Norm of the whole gradient of the last step, as the optimizer was given it."""
        signals = self.signals()
        return 0.0 if signals is None else float(signals.grad_norm_S.norm())

    def full_state(self, *keys: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name and whole state of each tensor, one at a time; all ranks must iterate together.

        Args:
            keys: some of "weight" and `moments`; all of them by default.

        Yields:
            the name, and key -> fp32 tensor of the full shape, on each rank. It needs no layout:
            any world size and ZeRO stage can load it.
        """
        self._require_attached()
        where = {
            name: (flat, index)
            for flat in self._flats.values()
            for index, name in enumerate(flat.names)
        }
        for name in self._shapes:
            flat, index = where[name]
            yield name, {key: self._gather(flat, index, key) for key in keys or self._keys}

    @property
    def _keys(self) -> tuple[str, ...]:
        return ("weight", *self.moments)

    def _tensor(self, flat: Flat, key: str) -> Tensor:
        return flat.view(None if key == "weight" else self.state[flat.tensor][key])

    def _gather(self, flat: Flat, index: int, key: str) -> Tensor:
        shape = flat.shapes[index]
        source = self._tensor(flat, key)
        full = torch.zeros(math.prod(shape), device=self._meeting_place or source.device)
        for segment in flat.segments:
            if segment.index == index:
                full[segment.start : segment.start + segment.length] = segment.of(source)
        if flat.sharded:
            ranks.all_reduce_sum(bits(full), flat.group)
        return full.view(shape)

    @torch.no_grad()
    def load_full_state(self, get: Callable[[str], Mapping[str, Tensor]], step_count: int) -> None:
        """Continue from whole tensors; each rank cuts its own segments. All ranks must call.

        Weights go into the fp32 masters, and the engine's low-precision copies follow. With the
        same world size and stage the run goes on bit for bit.

        Args:
            get: name -> key -> whole tensor, as `full_state` yielded it.
            step_count: optimizer steps done.

        Raises:
            ValueError: a tensor is missing or has another shape; nothing is changed then.
        """
        self._require_attached()
        for flat in self._flats.values():
            for segment in flat.segments:
                _check_state(
                    get(segment.name), segment.name, flat.shapes[segment.index], self._keys
                )
        for flat in self._flats.values():
            self.state[flat.tensor]["step"] = step_count
            for segment in flat.segments:
                self._scatter(flat, segment, get(segment.name))
        if self._engine is not None:
            from mocov3_ds.distributed import zero

            zero.refresh(self._engine)

    def _scatter(self, flat: Flat, segment: Segment, state: Mapping[str, Tensor]) -> None:
        for key in self._keys:
            source = state[key].reshape(-1)[segment.start : segment.start + segment.length]
            segment.of(self._tensor(flat, key)).copy_(source)

    def loss_scale(self) -> dict[str, float]:
        """State of the engine's fp16 loss scaling as plain numbers; empty when there is none."""
        if self._engine is None:
            return {}
        from mocov3_ds.distributed import zero

        return zero.loss_scale(self._engine)

    def load_loss_scale(self, state: Mapping[str, float]) -> None:
        """Continue loss scaling where `loss_scale` found it."""
        if self._engine is not None:
            from mocov3_ds.distributed import zero

            zero.load_loss_scale(self._engine, state)

    def _require_attached(self) -> None:
        if not self._flats:
            raise ValueError(_not_attached(type(self).__name__))


def _gradient(flat: Flat) -> Tensor:
    """Gradient of a flat tensor in one dimension; zeros where a tensor took no part in the loss."""
    tensor = flat.tensor
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    elif tensor.grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {flat.names[0]!r} is sparse; build the layer with sparse=False and "
            "remove sparse_gradients from the DeepSpeed config."
        )
    elif not tensor.grad.is_contiguous():
        tensor.grad = tensor.grad.contiguous()
    return tensor.grad.view(-1)


def _check_nothing_to_do(tensors: list[Tensor], kind: str) -> None:
    """Before `attach`, DeepSpeed's own call with zero gradients is fine and nothing else is."""
    for tensor in tensors:
        if tensor.grad is not None and bool(tensor.grad.any()):
            raise ValueError(_not_attached(kind))


def _not_attached(kind: str) -> str:
    return (
        f"{kind} does not know its tensors' segments yet; call optimizer.attach(engine) after "
        "deepspeed.initialize (or optimizer.attach() without DeepSpeed)."
    )


def _check_state(
    state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], keys: Iterable[str]
) -> None:
    for key in keys:
        if key not in state:
            raise ValueError(
                f"the saved state of {name!r} has no {key!r}; it was written by another optimizer."
            )
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"the saved {key} of {name!r} has shape {tuple(state[key].shape)}, the model's "
                f"tensor {shape}."
            )
