"""A plan as text and as JSON: the same numbers, each once."""

import json

import pytest

from mocov3_ds.planning.cards import GIB
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.hardware import read_cluster
from mocov3_ds.planning.plan_text import Plan, as_json, format_plan
from mocov3_ds.planning.remedies import fitting_options


def make_plan(gpus: str = "16x24GB", price: float = 0.5) -> Plan:
    planned, cluster = plan_run("vit_l16"), read_cluster(gpus)
    options = fitting_options(planned, cluster)
    return Plan(
        planned=planned, cluster=cluster, options=options, price=price, launch="the command"
    )


def test_the_text_names_every_item_and_every_collective() -> None:
    plan = make_plan()
    best, text = plan.options[0], format_plan(plan)
    assert best.pace is not None
    for item in best.memory.items:
        assert f"  {item.name} " in text or item.bytes < 1
    for collective, _ in best.pace.collectives:
        assert f"  {collective.purpose} " in text
    assert f"{best.memory.peak_bytes / GIB:.3f}  of {plan.cluster.usable_bytes / GIB:.1f}" in text
    assert text.endswith("Start it:\n\n    the command")
    assert text.count("the fastest that fits") == 1


def test_what_is_not_alive_at_the_peak_stands_in_brackets() -> None:
    plan = make_plan()
    memory, text = plan.options[0].memory, format_plan(plan)
    for item in memory.items:
        [*lines] = [line for line in text.splitlines() if line.startswith(f"  {item.name} ")]
        if item.bytes >= 1 and len(lines) == 1:
            assert ("(" in lines[0]) == (memory.peak_phase not in item.alive), item.name


def test_json_holds_the_same_plan() -> None:
    plan = make_plan()
    tree = json.loads(json.dumps(as_json(plan), allow_nan=False))
    assert [entry["stage"] for entry in tree["options"]] == [o.setup.stage for o in plan.options]
    best, pace = tree["options"][0], plan.options[0].pace
    assert pace is not None
    assert best["step_s"] == pace.step_s
    assert best["memory"]["total"] == plan.options[0].memory.peak_bytes
    assert best["cost"] == best["hours"] * 16 * 0.5
    assert tree["hardware"]["card"] == "24GB (as RTX3090)"
    parts = ("compute_s", "elementwise_s", "update_s", "communication_s")
    assert sum(best[part] for part in parts) == pytest.approx(best["step_s"])
    assert tree["schema"] == 2 and best["cost_low"] < best["cost"] < best["cost_high"]
    for entry in tree["options"]:
        assert entry["fits"] == ("step_s" in entry)
