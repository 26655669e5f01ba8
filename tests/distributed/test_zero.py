"""Partitions of real engines seen as segments: exact cover, padding, and what is refused."""

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from mocov3_ds.distributed import ranks, zero
from mocov3_ds.distributed.engine import start_engine
from mocov3_ds.distributed.engine_config import engine_config
from mocov3_ds.optim import Lamb
from mocov3_ds.optim.build import build_optimizer
from tests.ds_configs import CONFIGS
from tests.optim import engines, plain
from tests.optim.engines import Case
from tests.ranks_pool import run_ranks

FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}}
MASTERS = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
FP16_AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
LAYOUTS = {
    "Lamb": Case(0),
    "FP16_UnfusedOptimizer": Case(0, "bf16"),
    "DeepSpeedZeroOptimizer": Case(1),
    "DeepSpeedZeroOptimizer, round robin": Case(2, "bf16", zero={"round_robin_gradients": True}),
    "DeepSpeedZeroOptimizer, aligned": Case(2, zero={"parameter_alignment": True}),
    "BF16_Optimizer": Case(1, "bf16", config=FP32_GRADIENTS),
    "DeepSpeedZeroOptimizer_Stage3": Case(3),
    "DeepSpeedZeroOptimizer_Stage3, sub-groups": Case(3, "bf16", zero={"sub_group_size": 500}),
    "DeepSpeedZeroOptimizer_Stage3, zero.Init": Case(3, sharded_init=True),
}


def describe(case: Case) -> dict[str, Any]:
    """What one rank holds: (name, shape, start, elements) of each segment, and the padding."""
    if case.stage == 3:  # what the allocator leaves in the padding is then NaN
        torch.use_deterministic_algorithms(True)
    engine, optimizer = engines.start(case)
    torch.use_deterministic_algorithms(False)
    held, padding, order = [], [], []
    for flat in optimizer._flats.values():
        view = flat.view()
        order.append((flat.names, flat.shapes))
        for segment in flat.segments:
            shape = flat.shapes[segment.index]
            held.append((segment.name, shape, segment.start, segment.of(view).clone()))
        padding += [view[first:behind].clone() for first, behind in flat.gaps()]
    result = {
        "wrapper": type(engine.optimizer).__name__,
        "sharded": [flat.sharded for flat in optimizer._flats.values()],
        "held": held,
        "padding": torch.cat([*padding, torch.zeros(0)]),
        "order": order,
    }
    engines.stop(engine)
    return result


class TwoElements(nn.Module):
    """So small that all ranks but the first hold padding only."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[3.0, 4.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w * x).sum()


def padding_only(stage: int) -> dict[str, Any]:
    engines.quiet()
    model = TwoElements()
    optimizer = Lamb(model.named_parameters(), lr=0.1, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=engines.ds_config(Case(stage))
    )
    optimizer.attach(engine)
    engine.backward(engine(torch.tensor([[1.0, -2.0]])))
    engine.step()
    (state,) = [state for _, state in optimizer.full_state("weight")]
    segments = [len(flat.segments) for flat in optimizer._flats.values()]
    ratio = optimizer.signals().rows()["w"]["trust_ratio"]
    engines.stop(engine)
    return {"w": state["weight"], "segments": segments, "ratio": ratio}


def said(action: Callable[[], Any]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals() -> dict[str, str]:
    """What `attach` says where it cannot be exact, and under a layout that is not known."""
    words = {}
    for key, case in {
        "bf16 masters": Case(2, "bf16", config={"bf16": MASTERS}),
        "fp16 stage 0": Case(0, "fp16"),
    }.items():
        engine, optimizer = engines.start_unattached(case)
        words[key] = said(lambda: optimizer.attach(engine))  # noqa: B023
        engines.stop(engine)

    engine, optimizer = engines.start_unattached(Case(1))
    other = Lamb(plain.odd_model().named_parameters())
    words["another optimizer"] = said(lambda: other.attach(engine))
    groups = engine.optimizer.round_robin_bit16_groups[0]
    groups[1], groups[2] = groups[2], groups[1]
    words["permuted"] = said(lambda: optimizer.attach(engine))
    groups[1], groups[2] = groups[2], groups[1]
    engine.optimizer.__class__ = type("MiCS_Optimizer", (type(engine.optimizer),), {})
    words["unknown wrapper"] = said(lambda: optimizer.attach(engine))
    engines.stop(engine)

    engine, optimizer = engines.start_unattached(Case(3))
    if engine.global_rank == 1:  # one rank alone sees it, and all must hear of it
        engine.optimizer.fp32_partitioned_groups_flat[0].data[0] += 1
    words["one element on one rank"] = said(lambda: optimizer.attach(engine))
    engines.stop(engine)

    engine, optimizer = engines.start_unattached(Case(1))
    engines.backward(engine, *next(engines.batches(Case(1), 1))[0])
    words["step before attach"] = said(engine.step)
    engines.stop(engine)

    # last: DeepSpeed keeps autocast's settings for the process
    engine, optimizer = engines.start_unattached(Case(2, config=FP16_AUTOCAST))
    words["fp16 autocast"] = said(lambda: optimizer.attach(engine))
    engines.stop(engine)
    return words


def constructor_step() -> bool:
    """Whether the weights survive the step that DeepSpeed takes while it is being built."""
    engine, optimizer = engines.start(Case(0, "bf16"))
    first = {n: p.to(torch.bfloat16).float() for n, p in plain.odd_model().named_parameters()}
    same = all(torch.equal(w, first[n]) for n, w in engines.weights(optimizer).items())
    same = same and optimizer.step_count == 0
    engines.stop(engine)
    return same


def look(with_refusals: bool) -> dict[str, Any]:
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    result: dict[str, Any] = {name: describe(case) for name, case in LAYOUTS.items()}
    result["padding only"] = {stage: padding_only(stage) for stage in (1, 2, 3)}
    if with_refusals:
        result["constructor step"] = constructor_step()
        result["refusals"] = refusals()
    return result


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, look, True, timeout=600)


def check_layouts(results: list[dict[str, Any]]) -> None:
    model = plain.odd_model()
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for name, case in LAYOUTS.items():
        held_by = [result[name] for result in results]
        assert held_by[0]["wrapper"] == name.split(",")[0]
        assert all(rank["sharded"] == [case.stage > 0] * len(rank["sharded"]) for rank in held_by)
        assert all(rank["order"] == held_by[0]["order"] for rank in held_by), name
        count = {n: torch.zeros(w.numel()) for n, w in weights.items()}
        for rank in held_by if case.stage else held_by[:1]:
            for tensor, shape, start, values in rank["held"]:
                assert shape == tuple(weights[tensor].shape)
                piece = slice(start, start + len(values))
                want = weights[tensor].reshape(-1)[piece]
                want = want.to(torch.bfloat16).float() if case.precision == "bf16" else want
                assert torch.equal(values, want), (name, tensor)
                count[tensor][piece] += 1
        assert all((c == 1).all() for c in count.values()), name
        assert not torch.cat([rank["padding"] for rank in held_by]).any(), name  # NaN counts as any


def test_each_layout_covers_each_element_once(two_ranks: list[dict[str, Any]]) -> None:
    check_layouts(two_ranks)
    assert any(len(rank[name]["padding"]) for rank in two_ranks for name in LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_each_layout_on_other_world_sizes(world_size: int) -> None:
    results = run_ranks(world_size, look, False, timeout=900)
    check_layouts(results)
    if world_size == 4:
        cut = [r["DeepSpeedZeroOptimizer"]["held"] for r in results]
        holders = [
            rank for rank, held in enumerate(cut) if any(h[0] == "wide.weight" for h in held)
        ]
        assert len(holders) > 2  # one tensor over more than two ranks


def shipped_runs() -> dict[str, tuple[str, int]]:
    """Kind and done steps of two with each DeepSpeed config, as the trainer starts its engine."""
    warnings.filterwarnings("ignore")  # DeepSpeed's own
    engines.quiet()
    done = {}
    for name, config in CONFIGS.items():
        if "fp16" in config:
            config["fp16"]["initial_scale_power"] = 8  # so that no step of two is skipped
        model = plain.odd_model()
        optimizer = build_optimizer(config["optimizer"], model.named_parameters())
        full = engine_config(config, global_batch=engines.BATCH, world_size=ranks.world_size())
        engine = start_engine(model, optimizer, full)
        engines.train(engine, engines.batches(Case(0, name.split("_")[2]), 2))
        moved = any(row["update_norm"] > 0 for row in optimizer.signals().rows().values())
        done[name] = (type(optimizer).__name__, optimizer.step_count * moved)
        engines.stop(engine)
    return done


@pytest.mark.slow
def test_each_config_trains() -> None:
    done = run_ranks(2, shipped_runs, timeout=900)[0]
    assert done == {name: ("Lamb" if "lamb" in name else "AdamW", 2) for name in CONFIGS}


def test_a_rank_of_padding_takes_part(two_ranks: list[dict[str, Any]]) -> None:
    for stage in (1, 2, 3):
        first, second = (rank["padding only"][stage] for rank in two_ranks)
        if stage < 3:
            assert (first["segments"], second["segments"]) == ([1], [0])
        # the first direction is the gradient's sign, of norm sqrt 2; the weight's norm is 5
        want = torch.tensor([[3.0, 4.0]]) - 0.1 * 5 / 2**0.5 * torch.tensor([[1.0, -1.0]])
        for rank in (first, second):
            assert rank["ratio"] == pytest.approx(5 / 2**0.5, rel=1e-5)
            assert torch.allclose(rank["w"], want, rtol=1e-5)


WORDS = {
    "bf16 masters": "ValueError: the optimizer is given torch.bfloat16 weights and needs fp32",
    "fp16 stage 0": "ValueError: fp16 at ZeRO stage 0 is computed wrongly by DeepSpeed",
    "fp16 autocast": "ValueError: torch_autocast in float16 may skip the step on one rank",
    "another optimizer": "ValueError: the engine was built with another optimizer",
    "permuted": "RuntimeError: this DeepSpeed lays out its partitions in a way",
    "one element on one rank": "RuntimeError: this DeepSpeed lays out its partitions in a way",
    "unknown wrapper": "ValueError: DeepSpeed wraps the optimizer in MiCS_Optimizer",
    "step before attach": "ValueError: Lamb does not know its tensors' segments yet; call",
}


@pytest.mark.parametrize("key", WORDS)
def test_refused_on_all_ranks(two_ranks: list[dict[str, Any]], key: str) -> None:
    for rank in two_ranks:
        assert rank["refusals"][key].startswith(WORDS[key])


def test_nothing_moves_before_the_first_step(two_ranks: list[dict[str, Any]]) -> None:
    assert two_ranks[0]["constructor step"]


@pytest.mark.parametrize(
    ("engine", "wrapper", "words"),
    [
        ({"mpu": object()}, {}, "tensor .model. parallelism cuts a tensor once more"),
        ({}, {"model_parallel_group": object()}, "use data parallelism .ZeRO. alone"),
        ({"has_moe_layers": True}, {}, "mixture-of-experts"),
        ({"pipeline_parallelism": True}, {}, "pipeline parallelism"),
        ({}, {"swap_optimizer": True}, "offload to NVMe"),
        ({}, {"params_in_nvme_and_cpu": True}, "offload to NVMe"),
    ],
)
def test_refused_without_the_hardware_for_it(
    engine: dict[str, Any], wrapper: dict[str, Any], words: str
) -> None:
    """Engines that this machine cannot start, as the attributes that give them away."""
    stand_in = SimpleNamespace(**({"mpu": None, "optimizer": SimpleNamespace(**wrapper)} | engine))
    with pytest.raises(ValueError, match=words):
        zero.describe_flats(stand_in, {})
