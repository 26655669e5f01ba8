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

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from mocov3_ds.distributed.segments import Flat, full_shape
from mocov3_ds.optim.arguments import NamedParameters, select_trained
from mocov3_ds.optim.flat_step import describe_flats, flat_gradient, sum_over_ranks
from mocov3_ds.optim.full_state import check_state, gather_tensor, scatter_tensor
from mocov3_ds.optim.kernel_types import BACKENDS, EVERYTHING, NORMS, FlatStep
from mocov3_ds.optim.kernels import choose_kernels
from mocov3_ds.optim.rules import RuleFor, check_rule, vit_rule
from mocov3_ds.optim.signals import (
    Signals,
    StepFactors,
    StepRecord,
    StepSums,
    join_signals,
    mark_undefined,
)
from mocov3_ds.optim.step_tables import StepTables, build_tables

if TYPE_CHECKING:
    from mocov3_ds.distributed.engine import Engine


class ShardedOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that stay exact per tensor on any sharding.

    A subclass must give `moments`, `measure_flat` and `move_flat`, and a constructor whose keywords
    are those of its JSON block (`rule` and `backend` among them). With that it works everywhere:
    steps under each ZeRO stage, signals, checkpoints, the planner, the stability grids. What else
    is particular to it, it says by overriding the class attributes and methods below.

    Args:
        named_parameters: `model.named_parameters()`. Frozen and empty tensors are left out.
        defaults: Hyper-parameters of the one parameter group; `lr` must be one of them.
        rule: Function of a tensor's name and full shape that gives its `Rule`.
        backend: Which kernels do the arithmetic, one of `kernel_types.BACKENDS`.

    Raises:
        ValueError: Tensors without names, names given twice, nothing to train, complex tensors,
            an impossible rule or hyper-parameter.
    """

    moments: ClassVar[tuple[str, ...]]
    """names of the state tensors beside each weight, each as large as the weight; may be empty"""
    aliases: ClassVar[tuple[str, ...]] = ()
    """further types of a DeepSpeed JSON's optimizer block that mean this optimizer"""
    hints: ClassVar[Mapping[str, str]] = {}
    """keys that users try in vain in such a block -> what to do instead"""
    has_trust_ratio: ClassVar[bool] = False
    """whether a ratio of norms scales the step of each tensor whose rule adapts"""
    measures_rms: ClassVar[bool] = False
    """whether `measure_flat` fills the rows AFTER and BEFORE of the sums"""
    accepts_update_clip: ClassVar[bool] = False
    """whether the update clip can be switched between steps; `update_clip` is a keyword then"""

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
        self._flats: dict[Tensor, Flat] = {}
        self._tables: dict[tuple[int, ...], StepTables] = {}
        self._records: dict[tuple[int, ...], StepRecord] = {}
        self._engine: Engine[nn.Module] | None = None
        self._exchange_device: torch.device | None = None
        super().__init__(list(trained.values()), defaults)

    # ---------------------------------------------------------------- what a subclass gives

    @abstractmethod
    def measure_flat(self, flat: FlatStep, sums_QS: Tensor, rate_S: Tensor) -> None:
        """First pass over one flat: update its state tensors and measure it.

        Nothing may depend on other ranks here. An optimizer that needs to know no norm may move
        the weights at once and do nothing in `move_flat`.

        Args:
            flat: The flat tensor with its gradient, state and hyper-parameters.
            sums_QS: Sums so far, to which each segment's are added (see `plain_kernels.add_sums`).
            rate_S: Learning rate of each tensor.
        """

    @abstractmethod
    def move_flat(self, flat: FlatStep, rate_S: Tensor, factor_S: Tensor) -> None:
        """Second pass over one flat: move its weights.

        Args:
            flat: The flat tensor, as the first pass left it.
            rate_S: Learning rate of each tensor.
            factor_S: Factor of each tensor's step, as `compute_factors` gave it.
        """

    def compute_factors(self, sums: StepSums, group: Mapping[str, Any]) -> StepFactors:
        """Factor of each tensor's step beside the learning rate; by default there is none.

        Args:
            sums: What the first pass measured, over all ranks.
            group: Hyper-parameters, as the constructor gave them.
        """
        adapt_S = sums.tables.adapt_S
        return StepFactors(torch.ones_like(sums.tables.multiplier_S), torch.zeros_like(adapt_S))

    def count_quantities(self, group: Mapping[str, Any]) -> int:
        """Number Q of quantities that the step itself needs: `NORMS` or `NORMS_AND_RMS`."""
        return NORMS

    @classmethod
    def bytes_moved(cls) -> int:
        """Bytes that a step must move for each weight; by default those of a single pass.

        One pass reads weight, gradient and state and writes weight and state, in fp32.
        """
        return 4 * (3 + 2 * len(cls.moments))

    @classmethod
    def translate_params(cls, params: dict[str, Any]) -> dict[str, Any]:
        """Params of a JSON's optimizer block in this optimizer's own keywords.

        Args:
            params: The block's params; DeepSpeed's or another library's spellings may be in it.

        Raises:
            ValueError: The params contradict each other, or ask for another algorithm.
        """
        return params

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
        self._tables, self._records = {}, {}
        for flat in flats:
            # here and not at the first step: DeepSpeed links state fragments after the first
            # group's step and does not find those of the others otherwise
            state = self.state[flat.tensor]
            state.setdefault("step", 0)
            for key in self.moments:
                if key not in state:
                    state[key] = torch.zeros_like(flat.tensor, requires_grad=False)

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
                if any(tensor.grad is not None and tensor.grad.any() for tensor in tensors):
                    self._require_attached()  # DeepSpeed's own call with zero gradients is fine
            elif any(tensor.grad is not None for tensor in tensors):
                key = tuple(id(tensor) for tensor in tensors)
                if key not in self._tables:
                    flats = [self._flats[tensor] for tensor in tensors]
                    self._tables[key] = build_tables(flats, self._rules)
                self._records[key] = self._step_tensors(self._tables[key], group)
        return loss

    def _step_tensors(self, tables: StepTables, group: Mapping[str, Any]) -> StepRecord:
        kernels = choose_kernels(self._backend, tables.device)
        gradients = [flat_gradient(share.flat) for share in tables.shares]
        flats = []
        for share, gradient in zip(tables.shares, gradients, strict=True):
            flat, state = share.flat, self.state[share.flat.tensor]
            number = state["step"] = state["step"] + 1
            moments = tuple(flat.view(state[key]) for key in self.moments)
            flats.append(FlatStep(share, kernels, flat.view(), gradient, moments, group, number))
        rate_S = tables.multiplier_S * group["lr"]
        quantities = EVERYTHING if self._measures_all else self.count_quantities(group)
        local_QS = torch.zeros(quantities, len(tables.names), device=tables.device)
        for flat_step in flats:
            self.measure_flat(flat_step, local_QS, rate_S)
        sums_QS = sum_over_ranks(tables.shares, local_QS, self._exchange_device)
        if self._measures_all:
            sums_QS = mark_undefined(
                sums_QS, measures_rms=self.measures_rms, first_step=self.step_count == 1
            )
        sums = StepSums(tables, local_QS, sums_QS)
        factors = self.compute_factors(sums, group)
        for flat_step in flats:
            self.move_flat(flat_step, rate_S, factors.factor_S)
        return StepRecord(sums, factors, rate_S)

    def _require_attached(self) -> None:
        if not self._flats:
            raise ValueError(
                f"{type(self).__name__} does not know its tensors' segments yet; call "
                "optimizer.attach(engine) after deepspeed.initialize (or optimizer.attach() "
                "without DeepSpeed)."
            )

    # --------------------------------------------------------------------- signals and state

    def signals(self) -> Signals | None:
        """What the last step measured, without communication; None before the first."""
        records = list(self._records.values())
        return join_signals(records, list(self._shapes)) if records else None

    def grad_norm(self) -> float:
        """Norm of the whole gradient of the last step, as the optimizer was given it."""
        signals = self.signals()
        return 0.0 if signals is None else float(signals.grad_norm_S.norm())

    def full_state(self, *keys: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Name and whole state of each tensor, one at a time; all ranks must iterate together.

        Args:
            keys: Some of "weight" and `moments`; all of them by default.

        Yields:
            The name, and key -> fp32 tensor of the full shape, on each rank. It needs no layout:
            any world size and ZeRO stage can load it.
        """
        self._require_attached()
        positions = {
            name: (flat, index)
            for flat in self._flats.values()
            for index, name in enumerate(flat.names)
        }
        for name in self._shapes:
            flat, index = positions[name]
            device = self._exchange_device or flat.tensor.device
            state = {}
            for key in keys or self._keys:
                state[key] = gather_tensor(flat, index, self._values(flat, key), device)
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
        self._require_attached()
        flats = self._flats.values()
        for flat in flats:
            for segment in flat.segments:
                shape = flat.shapes[segment.index]
                check_state(get(segment.name), segment.name, shape, self._keys)
        for flat in flats:
            self.state[flat.tensor]["step"] = step_count
            for segment in flat.segments:
                saved = get(segment.name)
                for key in self._keys:
                    scatter_tensor(segment, saved[key], self._values(flat, key))
        if self._engine is not None:
            from mocov3_ds.distributed import zero

            zero.refresh_weights(self._engine)

    @property
    def _keys(self) -> tuple[str, ...]:
        return ("weight", *self.moments)

    def _values(self, flat: Flat, key: str) -> Tensor:
        return flat.view(None if key == "weight" else self.state[flat.tensor][key])
