"""The base of all optimizers: rules by name, segments, signals, state that knows no layout.

    optimizer = Lamb(model.named_parameters(), lr=2e-3)     here: names, full shapes, rules
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    optimizer.attach(engine)                                here: which segments lie on this rank

A step measures once over the segments (moments, direction, square sums of weight, direction and
gradient), adds the sums of all ranks in one small all-reduce, and moves the weights. Each rank
takes part in the all-reduce, also one that holds nothing but padding. After `measure_all(True)` the
same pass measures four more quantities a tensor, in the same all-reduce, and the largest
|gradient|, whose maximum over the ranks takes a second one of a float a tensor.

DeepSpeed calls `step` once per flat tensor (stages 1 to 3) or once for all (stage 0), and once more
with zero gradients while it is being built (stage 0, bf16); that last call changes nothing here.

Legend: S = tensors that one call of `step` updates; Q = quantities measured, see `kernel_types`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from mocov3_ds.distributed.segments import Flat, full_shape
from mocov3_ds.optim.arguments import NamedParameters, select_trained
from mocov3_ds.optim.attachment import (
    check_attachable,
    check_whole,
    require_attached,
    tell_clipping,
)
from mocov3_ds.optim.contract import OptimizerContract
from mocov3_ds.optim.flat_step import (
    describe_flats,
    flat_gradient,
    measure_absent,
    start_sums,
    sum_over_ranks,
    watch_engine,
)
from mocov3_ds.optim.full_state import check_state, gather_tensor, scatter_tensor
from mocov3_ds.optim.gradient_clip import CLIP_KEY, Clipper
from mocov3_ds.optim.kernel_types import BACKENDS, EVERYTHING, FlatStep
from mocov3_ds.optim.kernels import choose_kernels
from mocov3_ds.optim.rules import Rule, RuleFor, check_rule, vit_rule
from mocov3_ds.optim.saved_state import check_state_dict
from mocov3_ds.optim.signals import (
    Signals,
    StepRecord,
    StepSums,
    join_signals,
    mark_undefined,
)
from mocov3_ds.optim.step_tables import StepTables, build_tables
from mocov3_ds.optim.update_counts import (
    KEPT,
    Parts,
    count_step,
    find_first_updates,
    restore_counts,
    split_by_updates,
    updates_of,
)

if TYPE_CHECKING:
    from mocov3_ds.distributed.engine import Engine
    from mocov3_ds.distributed.gradients import GradientWatch

_COPIED = ("_names", "_shapes", "_rules", "_backend", "_measures_all", "clipper")
"""What a copy needs beside what PyTorch keeps of an optimizer"""


class ShardedOptimizer(OptimizerContract):
    """Base of the optimizers that stay exact per tensor on any sharding.

    What a subclass gives is described by `contract.OptimizerContract`.

    Args:
        named_parameters: `model.named_parameters()`. Frozen and empty tensors are left out.
        defaults: Hyper-parameters of the one parameter group; `lr` must be one of them.
        rule: Function of a tensor's name and full shape that gives its `Rule`.
        backend: Which kernels do the arithmetic, one of `kernel_types.BACKENDS`.

    Raises:
        ValueError: Tensors without names, names given twice, nothing to train, complex tensors,
            an impossible rule or hyper-parameter.
    """

    def __init__(
        self,
        named_parameters: NamedParameters,
        defaults: dict[str, Any],
        rule: RuleFor = vit_rule,
        backend: str = "auto",
    ) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}.")
        trained = select_trained(named_parameters)
        self._names = {parameter: name for name, parameter in trained.items()}
        self._shapes = {name: full_shape(parameter) for name, parameter in trained.items()}
        self._rules = {
            name: check_rule(rule(name, shape), name) for name, shape in self._shapes.items()
        }
        self._backend = backend
        self._measures_all = False
        self.clipper: Clipper | None = None
        """what clips the gradients by their own history; None = nothing here"""
        self._detach()
        super().__init__(list(trained.values()), defaults)

    def _detach(self) -> None:
        """Know of no engine and no segments."""
        self._flats: dict[Tensor, Flat] = {}
        self._tables: dict[tuple[tuple[int, ...], frozenset[str]], StepTables] = {}
        self._parts: Parts = {}
        self._records: dict[tuple[int, ...], StepRecord] = {}
        self._signals: Signals | None = None  # of these records, once somebody asked
        self._engine: Engine[nn.Module] | None = None
        self._watch: GradientWatch | None = None
        self._exchange_device: torch.device | None = None

    # -------------------------------------------------------------------------------- set up

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the constructor adds a group.

        Raises:
            ValueError: A second group is added.
        """
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} keeps one parameter group; give a rule(name, shape) for "
                "what differs between tensors."
            )
        super().add_param_group(param_group)

    def attach(self, engine: "Engine[nn.Module] | None" = None) -> None:
        """Learn which segments are on this rank; all ranks must call, before the first step.

        Args:
            engine: What `deepspeed.initialize` returned, given this optimizer. Without one the
                model's own parameters are updated, whole, as by any PyTorch optimizer.

        Raises:
            ValueError: An engine of another optimizer, or one under which the step cannot be exact.
        """
        check_attachable(engine, self.clipper)
        if engine is None:
            for parameter, name in self._names.items():
                check_whole(name, parameter, self._shapes[name])
        flats = describe_flats(self, engine, self._names)
        missing = sorted({*self._shapes} - {name for flat in flats for name in flat.names})
        if missing:
            raise ValueError(
                f"{len(missing)} tensors of the optimizer are not in the engine's model, e.g. "
                f"{missing[0]!r}; build both from the same module."
            )
        for device in {flat.tensor.device for flat in flats}:
            choose_kernels(self._backend, device)
        self._engine = engine
        self._exchange_device = None if engine is None else torch.device(engine.device)
        self._flats = {flat.tensor: flat for flat in flats}
        self._watch = watch_engine(engine, self._names, flats)
        self._tables, self._parts, self._records, self._signals = {}, {}, {}, None
        for flat in flats:
            # here and not at the first step: DeepSpeed links state fragments after the first
            # group's step and does not find those of the others otherwise
            state = self.state[flat.tensor]
            state.setdefault("step", 0)
            for key in self._moments_beside(flat.tensor):
                if key not in state:
                    state[key] = torch.zeros_like(flat.tensor, requires_grad=False)
        if engine is not None:
            tell_clipping(engine)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle are made of.

        Raises:
            ValueError: An engine is attached, whose partitions no copy could have.
        """
        if self._engine is not None:
            raise ValueError(
                f"a {type(self).__name__} that is attached to a DeepSpeed engine cannot be copied "
                "or pickled, as its tensors are the engine's; keep dict(optimizer.full_state()), "
                "or use engine.save_checkpoint."
            )
        copied_attributes = {key: self.__dict__[key] for key in _COPIED}
        return super().__getstate__() | copied_attributes | {"attached": bool(self._flats)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Be a copy, or what a pickle holds; attached again if that was."""
        copied = "attached" in state  # PyTorch's load_state_dict calls this, too
        attached = state.pop("attached", False)
        if copied:
            self._detach()
        super().__setstate__(state)
        if attached:
            self.attach()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, on the same layout.

        Raises:
            ValueError: It is the state of another optimizer, of one with other `rule_options`, or
                of another model; nothing is changed.
        """
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        keys = [("step", *self._moments_beside(tensor)) for tensor in tensors]
        shapes = [tensor.shape for tensor in tensors] if self._whole else []
        options = [key for key in self.defaults if key not in self.later_options]
        fixed = {key: self.defaults[key] for key in self.rule_options}
        check_state_dict(state_dict, type(self).__name__, options, fixed, keys, shapes)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    @property
    def _whole(self) -> bool:
        return self._engine is None and not any(hasattr(t, "ds_id") for t in self._names)

    # ------------------------------------------------------------------------------ stepping

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the coming steps."""
        for group in self.param_groups:
            group["lr"] = lr

    def measure_all(self, on: bool) -> None:
        """Set whether coming steps measure everything, or the norms alone.

        Everything is, beside the norms, the largest |gradient|, the RMS of g / sqrt(v) and the
        cosine of gradient and momentum; see `Signals`.
        """
        self._measures_all = on

    @property
    def update_clip(self) -> bool:
        """Whether coming steps clip the updates."""
        return bool(self.param_groups[0].get("update_clip", False))

    def set_update_clip(self, on: bool) -> None:
        """Clip the updates of the coming steps, or no longer.

        Raises:
            ValueError: This optimizer has no update clip.
        """
        if not self.accepts_update_clip:
            raise ValueError(f"{type(self).__name__} has no update clip.")
        for group in self.param_groups:
            group["update_clip"] = on

    @property
    def step_count(self) -> int:
        """Optimizer steps done; steps that fp16 skipped are not counted."""
        return max((self.state[flat]["step"] for flat in self._flats), default=0)

    @property
    def rules(self) -> Mapping[str, Rule]:
        """What holds for each tensor, by name."""
        return self._rules

    def update_counts(self) -> dict[str, int]:
        """Updates that each tensor has had, as its moments are corrected for them."""
        counts_own = self.counts_own_updates
        return {
            name: updates_of(name, self.state[tensor]) if counts_own else self.state[tensor]["step"]
            for tensor, flat in self._flats.items()
            for name in flat.names
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every tensor that has a gradient, of those that DeepSpeed presents.

        A tensor without a gradient, at whatever stage, stays as it is, with its moments: it took no
        part in the loss, or is frozen. The gradient buffers are used as scratch space.

        Raises:
            ValueError: `attach` was not called, a gradient is sparse, or a tensor has a gradient on
                some ranks alone where the ranks share the tensors (ZeRO stages 1 to 3).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_groups()
        return loss

    @_disable_dynamo  # torch.compile(optimizer.step) works so
    def _step_groups(self) -> None:
        for group in self.param_groups:
            tensors = group["params"]
            if self._flats and tensors:
                key = tuple(id(tensor) for tensor in tensors)
                tables = self._find_tables(key, tensors)
                self._signals = None
                self._records[key] = self._step_tensors(tables, group)
            elif any(tensor.grad is not None and tensor.grad.any() for tensor in tensors):
                require_attached(self, self._flats)  # DeepSpeed's own call with zeros is fine

    def _find_tables(self, key: tuple[int, ...], tensors: Sequence[Tensor]) -> StepTables:
        if self._watch is not None:
            absent = self._watch.absent()
        else:
            absent = frozenset(self._flats[t].names[0] for t in tensors if t.grad is None)
        if (key, absent) not in self._tables:
            if len(self._tables) >= KEPT:
                self._tables.clear()
            flats = [self._flats[tensor] for tensor in tensors]
            self._tables[key, absent] = build_tables(flats, self._rules, absent)
        return self._tables[key, absent]

    def _step_tensors(self, tables: StepTables, group: Mapping[str, Any]) -> StepRecord:
        flat_steps = self._present_flats(tables, group)
        if self.clipper is not None:
            engine = None if len(tables.names) == len(self._shapes) else self._engine
            self.clipper.clip_step(tables, flat_steps, self.state, self._exchange_device, engine)
        rate_S = tables.multiplier_S * group["lr"]
        quantities = EVERYTHING if self._measures_all else self.count_quantities(group)
        micro_batches = {} if self._watch is None else self._watch.micro_batches()
        block_QS = start_sums(tables, quantities, micro_batches)
        local_QS = block_QS[1:]
        for flat_step in flat_steps:
            self.measure_flat(flat_step, local_QS, rate_S)
        for share in tables.shares if tables.absent else ():
            measure_absent(share, self._flats[share.flat.tensor], tables.absent, local_QS)
        self.finish_directions(tables, flat_steps, local_QS)
        sums_QS = sum_over_ranks(tables, block_QS, self._exchange_device)
        if self._measures_all:
            is_first = find_first_updates(tables, self.state)
            sums_QS = mark_undefined(sums_QS, measures_rms=self.measures_rms, is_first=is_first)
        sums = StepSums(tables, local_QS, sums_QS)
        factors = self.compute_factors(sums, group)
        for flat_step in flat_steps:
            self.move_flat(flat_step, rate_S, factors.factor_S)
        return StepRecord(sums, factors, rate_S)

    def _present_flats(self, tables: StepTables, group: Mapping[str, Any]) -> list[FlatStep]:
        """Count the step, and put together what it is for each flat with a gradient."""
        kernels, flat_steps = choose_kernels(self._backend, tables.device), []
        present = [share for share in tables.shares if share.flat.segments]
        gradients = {share: flat_gradient(share.flat) for share in present}
        for share in tables.shares:
            flat, state = share.flat, self.state[share.flat.tensor]
            count_step(share, state, tables.absent)
            if share not in gradients:
                continue
            moments = tuple(flat.view(state[key]) for key in self._moments_beside(flat.tensor))
            tensors = (flat.view(), gradients[share], moments)
            parts = [(share, state["step"])]
            if self.counts_own_updates:
                parts = split_by_updates(share, state, self._parts)
            flat_steps += [FlatStep(cut, kernels, *tensors, group, n) for cut, n in parts]
        return flat_steps

    # --------------------------------------------------------------------- signals and state

    def signals(self) -> Signals | None:
        """What the last step measured, without communication; None before the first."""
        if self._signals is None and self._records:
            self._signals = join_signals(list(self._records.values()), list(self._shapes))
        return self._signals

    def grad_norm(self) -> float:
        """Norm of the whole gradient of the last step, as the optimizer was given it."""
        signals = self.signals()
        return 0.0 if signals is None else signals.whole_grad_norm

    def full_state(self, *keys: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name and whole state of each tensor, one at a time; all ranks must iterate together.

        Args:
            keys: Some of "weight", `moments` and "clip"; all of them by default.

        Yields:
            The name, and key -> fp32 tensor of the full shape (of the moments that it has), on each
            rank. It needs no layout: any world size and ZeRO stage can load it. A tensor without a
            gradient in some steps has their number as "skipped", if no keys are given.
        """
        require_attached(self, self._flats)
        positions = {
            name: (flat, index)
            for flat in self._flats.values()
            for index, name in enumerate(flat.names)
        }
        for name in self._shapes:
            flat, index = positions[name]
            device = self._exchange_device or flat.tensor.device
            state, lacks = {}, {*self.moments, CLIP_KEY} - {*self.moments_of(name)}
            for key in [k for k in keys or ("weight", *self.moments) if k not in lacks]:
                state[key] = gather_tensor(flat, index, self._values(flat, key), device)
            skipped = self.state[flat.tensor].get("skipped", {}).get(name)
            if skipped and not keys:
                state["skipped"] = torch.tensor(skipped)
            if self.clipper is not None and (not keys or CLIP_KEY in keys):
                state[CLIP_KEY] = self.clipper.state_of(flat, index, self.state[flat.tensor])
            yield name, state

    @torch.no_grad()
    def load_full_state(self, get: Callable[[str], Mapping[str, Tensor]], step_count: int) -> None:
        """Continue from whole tensors; each rank cuts its own segments. All ranks must call.

        Weights go into the fp32 masters, and the engine's low-precision copies follow. With the
        same world size and stage the run goes on bit for bit.

        Args:
            get: Function of a name that gives key -> whole tensor, as `full_state` yielded it.
            step_count: Optimizer steps done when the state was saved.

        Raises:
            ValueError: A tensor is missing or has another shape; nothing is changed then.
        """
        require_attached(self, self._flats)
        flats = self._flats.values()
        for flat in flats:
            for segment in flat.segments:
                name, shape = segment.name, flat.shapes[segment.index]
                check_state(get(name), name, shape, self._keys_of(name))
        for flat in flats:
            skipped, clips = {}, {}
            for segment in flat.segments:
                saved = get(segment.name)
                skipped[segment.name] = int(saved.get("skipped", 0))
                clips[segment.name] = saved.get(CLIP_KEY)
                for key in self._keys_of(segment.name):
                    scatter_tensor(segment, saved[key], self._values(flat, key))
            restore_counts(flat, self.state[flat.tensor], step_count, skipped)
            if self.clipper is not None:
                self.clipper.restore(flat, self.state[flat.tensor], clips)
        if self._engine is not None:
            from mocov3_ds.distributed import zero

            zero.refresh_weights(self._engine)

    def _keys_of(self, name: str) -> tuple[str, ...]:
        return ("weight", *self.moments_of(name))

    def _moments_beside(self, tensor: Tensor) -> tuple[str, ...]:
        """State beside a tensor of the group: what a whole tensor has; of a cut flat, all."""
        flat = self._flats.get(tensor)
        name = self._names.get(tensor) if flat is None or flat.sharded else flat.names[0]
        return self.moments if name is None else self.moments_of(name)

    def _values(self, flat: Flat, key: str) -> Tensor:
        return flat.view(None if key == "weight" else self.state[flat.tensor][key])
