"""Which tensors had a gradient, micro-batch by micro-batch; under ZeRO see tests/optim."""

from typing import Any

import pytest
import torch
from torch import nn

from mocov3_ds.distributed.gradients import GradientWatch, full_gradients, watch_of
from mocov3_ds.distributed.segments import Flat, Segment, whole_flat


class OneFlat:
    """What a watch asks of DeepSpeed's wrapper of stage 2 without offload."""

    partition_gradients, overlap_comm, cpu_offload = True, False, False


class Engine:
    """What a watch asks of an engine."""

    def __init__(self, module: nn.Module, wrapper: Any) -> None:
        self.module, self.optimizer = module, wrapper
        self.global_steps = self.micro_steps = 0

    def gradient_accumulation_steps(self) -> int:
        return 2


def start(wrapper: Any, *, sharded: bool) -> tuple[nn.Module, Engine, GradientWatch]:
    model = nn.ModuleDict({name: nn.Linear(2, 1, bias=False) for name in "abc"})
    named = {parameter: name for name, parameter in model.named_parameters()}
    engine: Any = Engine(model, wrapper)
    flats = [whole_flat(name, parameter) for parameter, name in named.items()]
    if sharded:
        shapes = tuple((1, 2) for _ in named)
        segments = tuple(Segment(n, i, 0, 2, 2 * i) for i, n in enumerate(named.values()))
        flats = [Flat(torch.ones(6), tuple(named.values()), shapes, segments, sharded=True)]
    return model, engine, GradientWatch(engine, named, flats)


def use(model: nn.Module, names: str) -> None:
    sum(model[name](torch.ones(2)) for name in names).backward()  # type: ignore[index, union-attr]


@pytest.mark.parametrize("sharded", [True, False])
def test_what_took_part_in_a_step(sharded: bool) -> None:
    model, engine, watch = start(OneFlat(), sharded=sharded)
    assert watch.absent() == {"a.weight", "b.weight", "c.weight"}
    use(model, "ab")
    engine.micro_steps = 1
    use(model, "a")
    assert watch.absent() == {"c.weight"}
    assert watch.micro_batches() == ({"b.weight": 1} if sharded else {})
    engine.global_steps, engine.micro_steps = 1, 2  # dropped: the optimizer was never asked
    assert watch.absent() == {"a.weight", "b.weight", "c.weight"}
    use(model, "c")
    assert watch.absent() == {"a.weight", "b.weight"}
    watch.forget_step()
    assert len(watch.absent()) == 3
    model["c"].weight.requires_grad_(False)
    use(model, "ac")
    assert watch.absent() == {"b.weight", "c.weight"}
    watch.close()
    watch.forget_step()
    use(model, "a")
    assert len(watch.absent()) == 3


def test_a_tensor_that_is_frozen_at_first_is_watched_once_it_trains() -> None:
    model, engine, watch = start(OneFlat(), sharded=False)
    watch.close()
    model["b"].weight.requires_grad_(False)
    again = GradientWatch(engine, {p: n for n, p in model.named_parameters()}, [])
    use(model, "ab")
    assert again.absent() == {"b.weight", "c.weight"}
    assert not model["b"].weight.requires_grad
    model["b"].weight.requires_grad_(True)
    again.forget_step()
    use(model, "ab")
    assert again.absent() == {"c.weight"}


def test_a_flat_that_lives_on_is_cleared_where_nothing_came() -> None:
    model, _, watch = start(OneFlat(), sharded=True)
    flat = watch._flats[0].tensor
    flat.grad = torch.full((6,), 7.0)  # what a step on the CPU left behind
    use(model, "ac")
    watch.prepare_step()
    assert flat.grad.tolist() == [7, 7, 0, 0, 7, 7]


def test_what_overlapping_leaves_behind_is_refused() -> None:
    wrapper = type("DeepSpeedZeroOptimizer", (OneFlat,), {"partition_gradients": False})()
    wrapper.overlap_comm = True
    model, engine, watch = start(wrapper, sharded=True)
    use(model, "ab")
    engine.micro_steps = 1
    use(model, "ac")
    with pytest.raises(ValueError, match=r"'b\.weight' had its gradient in an earlier micro-batch"):
        watch.prepare_step()


def test_gradients_of_a_module_without_an_engine() -> None:
    model, _, watch = start(OneFlat(), sharded=False)
    assert watch_of(model) is watch and watch_of(nn.Linear(1, 1)) is None
    use(model, "ab")
    model["b"].weight.grad = None
    rows = {name: gradient.tolist() for name, gradient in full_gradients(model)}
    assert rows == {"a.weight": [[1, 1]], "b.weight": [[0, 0]], "c.weight": [[0, 0]]}
