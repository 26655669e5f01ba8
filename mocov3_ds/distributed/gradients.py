"""Which tensors had a gradient since the last step, and what DeepSpeed must forget of the others.

DeepSpeed hands an optimizer numbers for each tensor, whether it took part in the loss or not, and
where it did not, they are not always zero. Read from DeepSpeed 0.19 and met in practice:

    stage 3            each tensor's gradient lies in a buffer that lives as long as the engine: one
                       that took no part comes with its last gradient, which counts in the global
                       norm as well, and one that takes part only after the first micro-batch of a
                       step is added to it
    offload to a CPU   the fp32 gradient lives on, too, with whatever was left in it; the sum over
                       micro-batches starts from that of the step before for a tensor that was not
                       in the first one; and what was not in the last one is never handed over

So a hook on each tensor notes its gradients, micro-batch by micro-batch, before DeepSpeed reads
them; what is stale is made zero just before it would count, and what was left behind is handed
over. Where every tensor has a gradient in each micro-batch nothing is touched.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from mocov3_ds.distributed import ranks
from mocov3_ds.distributed.engine import Engine
from mocov3_ds.distributed.segments import Flat, full_shape

_BITS = 20
"""Micro-batches of a step that are told apart; their bits must be exact as a sum in fp32"""
_BUFFERS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class GradientWatch:
    """Notes which tensors of an engine's model have a gradient, from its making on.

    Args:
        engine: Engine that `deepspeed.initialize` has returned.
        names: Name of each trained model parameter.
        flats: The flat tensors of this rank, in which the gradients are handed over.

    Raises:
        RuntimeError: This DeepSpeed keeps its gradients in a way that is not known here.
    """

    def __init__(
        self, engine: Engine[nn.Module], names: Mapping[Tensor, str], flats: Sequence[Flat]
    ) -> None:
        self._engine = ref(engine)
        self._names, self._flats = dict(names), tuple(flats)
        self._replicated = not any(flat.sharded for flat in flats)
        self._cuts_each_gradient = bool(getattr(engine.optimizer, "partition_gradients", True))
        self._micro_batches: dict[str, int] = {}  # name -> a bit for each one with a gradient
        self._step_number = -1
        self._forget = _choose_forgetting(engine.optimizer)
        self._hooks = [self._hook(parameter) for parameter in names]
        _watches[engine.module] = ref(self)

    def _hook(self, parameter: Tensor) -> Any:
        """The hook of a tensor; one that is frozen now may be trained again later."""
        is_trained = parameter.requires_grad
        parameter.requires_grad_(True)  # torch hooks no others
        hook = parameter.register_hook(self._noting(parameter))  # type: ignore[no-untyped-call]
        parameter.requires_grad_(is_trained)
        return hook

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def absent(self) -> frozenset[str]:
        """Names of the tensors without a gradient since the last step.

        Where each rank has whole gradients (stage 0) one that any rank had counts, so that all
        ranks must ask together; elsewhere only this rank's are known.
        """
        batches_by_name = self._seen()
        missing = frozenset(name for name in self._names.values() if name not in batches_by_name)
        if not self._replicated or ranks.world_size() == 1:
            return missing
        order = list(self._names.values())
        flags_S = torch.tensor(
            [name in batches_by_name for name in order], device=ranks.this_device()
        )
        anywhere_S = ranks.all_reduce_max(flags_S.to(torch.int32))
        if not missing:
            return missing  # on a GPU nobody waits for the answer, which cannot change this
        return frozenset(n for n, flag in zip(order, anywhere_S.tolist(), strict=True) if not flag)

    def micro_batches(self) -> dict[str, int]:
        """Micro-batches of each tensor that has a gradient in some of them alone, as bits.

        Ranks that share the tensors must agree on it where DeepSpeed reduces after each micro-batch
        (stages 2 and 3); elsewhere nothing is said.
        """
        if self._replicated or not self._cuts_each_gradient:
            return {}
        batches_by_name = self._seen()
        every = 0
        for bits in batches_by_name.values():
            every |= bits
        return {name: bits for name, bits in batches_by_name.items() if bits != every}

    def prepare_step(self) -> None:
        """Let DeepSpeed forget what is stale, and take what it left behind; before its norm."""
        engine = self._engine()
        if engine is None or self._replicated:
            return
        absent = self.absent()
        if absent:
            for parameter, name in self._names.items():
                if name in absent:
                    self._forget(parameter)
            for flat in self._flats:
                if flat.tensor.grad is not None:  # on the CPU it lives on from step to step
                    for segment in flat.segments:
                        if segment.name in absent:
                            segment.of(flat.tensor.grad).zero_()
        last = _bit(engine)
        left_behind = sorted(name for name, bits in self._seen().items() if not bits & last)
        if left_behind:
            _hand_over(engine.optimizer, left_behind[0])

    def forget_step(self) -> None:
        """A step is over; what had a gradient in it need not have one in the next."""
        self._micro_batches.clear()

    def _seen(self) -> dict[str, int]:
        engine = self._engine()
        is_counted = engine is not None and self._step_number == engine.global_steps
        return self._micro_batches if is_counted else {}

    def _noting(self, parameter: Tensor) -> Callable[[Tensor | None], None]:
        # weakly, or tensor and hook would keep each other, and the engine's memory, alive
        name, this_watch, this_parameter = self._names[parameter], ref(self), ref(parameter)

        def note(gradient: Tensor | None) -> None:
            watch, noted = this_watch(), this_parameter()
            if gradient is not None and watch is not None and noted is not None:
                watch._note(noted, name)

        return note

    def _note(self, parameter: Tensor, name: str) -> None:
        engine = self._engine()
        if engine is None:
            return
        if self._step_number != engine.global_steps:  # a step that was dropped ends here
            self._step_number = engine.global_steps
            self._micro_batches.clear()
        micro_batches = self._micro_batches.get(name, 0)
        if not micro_batches and _is_added(engine.optimizer):
            self._forget(parameter)
        self._micro_batches[name] = micro_batches | _bit(engine)


_watches: WeakKeyDictionary[nn.Module, ref[GradientWatch]] = WeakKeyDictionary()
"""weakly, as a watch holds DeepSpeed's wrapper, which holds the module; the optimizer keeps it"""


def watch_of(module: nn.Module) -> GradientWatch | None:
    """The watch over the engine that trains a module, if one of our optimizers is attached."""
    watch = _watches.get(module)
    return None if watch is None else watch()


def watch_gradients(
    engine: Engine[nn.Module], names: Mapping[Tensor, str], flats: Sequence[Flat]
) -> GradientWatch:
    """Watch an engine from now on; an older watch over the same module ends.

    Args:
        engine: Engine that `deepspeed.initialize` has returned.
        names: Name of each trained model parameter.
        flats: The flat tensors of this rank.
    """
    previous = watch_of(engine.module)
    if previous is not None:
        previous.close()
    watch = GradientWatch(engine, names, flats)
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        _prepare_each_step(engine.optimizer, watch)
    return watch


def _prepare_each_step(wrapper: Any, watch: GradientWatch) -> None:
    """Call the watch before and after each step of DeepSpeed's wrapper."""
    step = getattr(wrapper.step, "unwatched", wrapper.step)

    def watched(*args: Any, **kwargs: Any) -> Any:
        watch.prepare_step()
        try:
            return step(*args, **kwargs)
        finally:
            watch.forget_step()

    watched.unwatched = step  # type: ignore[attr-defined]
    wrapper.step = watched


def _bit(engine: Engine[nn.Module]) -> int:
    """The bit of the present micro-batch; late ones of very many share one."""
    return 1 << min(engine.micro_steps % engine.gradient_accumulation_steps(), _BITS - 1)


def _is_added(wrapper: Any) -> bool:
    """Whether this micro-batch's gradients are added to those of earlier ones of the step."""
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return bool(wrapper.micro_step_id > 0)
    if kind == "DeepSpeedZeroOptimizer" and wrapper.cpu_offload:
        # the number goes up with the first gradient of a micro-batch, which is this one or was
        return bool(wrapper.micro_step_id + (not wrapper.ready_for_gradients) > 0)
    return False


def _choose_forgetting(wrapper: Any) -> Callable[[Tensor], None]:
    """What makes a tensor's sum over micro-batches zero; nothing where it does not live on."""
    kind = type(wrapper).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        buffers = getattr(wrapper, _BUFFERS, None)
        if buffers is None:
            raise RuntimeError(
                "this DeepSpeed keeps the gradients of ZeRO-3 in a way that is not known here; "
                "please report its version."
            )
        return lambda parameter: _make_zero(getattr(wrapper, _BUFFERS).get(parameter.ds_id))  # type: ignore[attr-defined]
    if kind == "DeepSpeedZeroOptimizer" and wrapper.cpu_offload:
        return lambda parameter: _make_zero(
            wrapper.accumulated_grads_in_cpu.get(wrapper.get_param_id(parameter))
        )
    return lambda parameter: None


def _make_zero(buffer: Tensor | None) -> None:
    if buffer is not None:
        buffer.zero_()


def _hand_over(wrapper: Any, name: str) -> None:
    """Let DeepSpeed take the sums of tensors that were not in the last micro-batch.

    Args:
        wrapper: DeepSpeed's wrapper around the optimizer.
        name: One of these tensors, for the message.

    Raises:
        ValueError: DeepSpeed has not reduced them.
    """
    if type(wrapper).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        if wrapper.offload_optimizer:
            wrapper._finalize_offload_gradient_accumulation()
    elif type(wrapper).__name__ == "DeepSpeedZeroOptimizer":
        if not wrapper.partition_gradients and wrapper.overlap_comm:
            raise ValueError(
                f"{name!r} had its gradient in an earlier micro-batch alone, and at ZeRO stage 1 "
                "with overlap_comm DeepSpeed reduces what is in the last one alone; remove "
                "overlap_comm, or use stage 2."
            )
        if wrapper.partition_gradients and wrapper.cpu_offload:
            wrapper._finalize_cpu_offload_gradient_accumulation()


def full_gradients(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole reduced gradient, fp32, of each trained parameter; all ranks must iterate.

    Between `engine.backward` and `engine.step`. One without a gradient counts as zero, whatever
    DeepSpeed has kept of an earlier step.
    """
    watch = watch_of(module)
    absent = watch.absent() if watch is not None else frozenset()
    if watch is not None:
        watch.prepare_step()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            shape, gradient = full_shape(parameter), safe_get_full_grad(parameter)
            missing = gradient is None or name in absent
            yield name, torch.zeros(shape) if missing else gradient.detach().float().view(shape)
