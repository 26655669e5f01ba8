"""A card by what was measured of it, instead of data sheet and published speeds.

`mocov3 plan --calibrate` measures this machine's processor, `mocov3 gpu` a GPU with whole steps of
training; both write a file that `mocov3 plan --rates FILE` plans with.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mocov3_ds.planning import architecture, reach
from mocov3_ds.planning.cards import PRESETS, Card, describe_own_card, find_card_of_device
from mocov3_ds.planning.hardware import Cluster
from mocov3_ds.planning.pace import plan_pace
from mocov3_ds.planning.step_setup import StepSetup

REPORT_SCHEMA = 1
"""version of what `mocov3 gpu --json` writes; the reader below takes no other"""
_LEAST_SPREAD = 1.05  # the steps that were measured are not all that a plan may ask for

MeasuredStep = tuple[StepSetup, float]
"""a step, and the seconds that it took"""


def read_rates(path: Path) -> Card:
    """The card that a file of measured rates describes: `cpu`, or a GPU by its preset's name.

    Args:
        path: what `mocov3 plan --calibrate` or `mocov3 gpu --json` wrote.

    Raises:
        ValueError: the file is missing or another one, or its numbers are void.
    """
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _refuse(path, error) from None
    if is_gpu_report(tree):
        _check_report(tree, path)
    try:
        return _read_report(tree, path) if is_gpu_report(tree) else _describe_cpu(tree, path)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise _refuse(path, error) from None


def _refuse(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is no file of measured rates ({error!r}); make one with "
        f"mocov3 plan --calibrate {path}, or on a GPU with mocov3 gpu --json {path}."
    )


def _check_report(tree: Mapping[str, Any], path: Path) -> None:
    """Make sure that a report of `mocov3 gpu` is of this version and has numbers.

    Raises:
        ValueError: it is not, or has none.
    """
    if tree.get("schema") != REPORT_SCHEMA:
        raise ValueError(
            f"{path} has schema {tree.get('schema')}, and this program reads {REPORT_SCHEMA}; run "
            "mocov3 gpu of this version again."
        )
    if tree.get("void"):
        raise ValueError(f"{path} is void: it was made on a device that computes nothing.")
    if not tree.get("rates"):
        raise ValueError(f"{path} holds no rates: mocov3 gpu ended before it measured any.")


def is_gpu_report(tree: Any) -> bool:
    """Whether a JSON tree is what `mocov3 gpu` writes.

    Args:
        tree: anything that a JSON file may hold.
    """
    return isinstance(tree, dict) and tree.get("program") == "mocov3 gpu"


def is_gpu_file(path: Path) -> bool:
    """Whether there is a file that `mocov3 gpu` wrote.

    Args:
        path: file that may be missing, or hold anything.
    """
    try:
        return is_gpu_report(json.loads(path.read_text()))
    except (OSError, ValueError):
        return False


def _read_report(tree: Mapping[str, Any], path: Path) -> Card:
    card = describe_gpu(tree["rates"])
    fitted = tree.get("reach") or {}
    measured = replace(
        card.reach,
        source=f"measured, {path}",
        products=float(fitted.get("products", card.reach.products)),
        spread=float(fitted.get("spread", card.reach.spread)),
    )
    return replace(card, reach=measured)


def describe_gpu(rates: Mapping[str, Any]) -> Card:
    """A GPU by its measured rates; links and network are its preset's, or those of PCIe 4.0.

    Args:
        rates: by name, as `calibrate.measure_gpu` returns them.
    """
    device, rate = str(rates["machine"]), float(rates["bf16_operations_per_s"])
    copy, memory = float(rates["copy_bytes_per_s"]), float(rates["memory_bytes"])
    preset = find_card_of_device(device)
    if preset is None:
        name = re.sub(r"[^A-Za-z0-9]+", "-", device.removeprefix("NVIDIA ")).strip("-")
        numbers = {"memory": memory / 2**30, "tflops": rate / 1e12, "bandwidth": copy / 1e9}
        preset = describe_own_card(f"{name}-measured", **numbers)
        preset = replace(preset, fp32_rate=float(rates["fp32_operations_per_s"]))
    share = min(rate / preset.low_precision_rate, 1.0)
    return replace(
        preset,
        memory_bytes=memory,
        bandwidth=copy / reach.STREAM,
        attention_rate=float(rates["attention_operations_per_s"]),
        elementwise_bandwidth=float(rates["elementwise_bytes_per_s"]),
        reach=replace(preset.reach, products=share, source=f"rates measured on {device}"),
        source=f"{preset.source}; rates measured on {device}",
    )


def _describe_cpu(rates: Mapping[str, Any], path: Path) -> Card:
    return replace(
        PRESETS["cpu"],
        memory_bytes=float(rates["memory_bytes"]),
        low_precision_rate=float(rates["bf16_operations_per_s"]),
        fp32_rate=float(rates["fp32_operations_per_s"]),
        bandwidth=float(rates["copy_bytes_per_s"]),
        attention_rate=float(rates["attention_operations_per_s"]),
        elementwise_bandwidth=float(rates["elementwise_bytes_per_s"]),
        reach=replace(reach.MACHINE, source=f"measured, {path}"),
        source=f"measured on {rates['machine']}, {rates['threads']} threads",
    )


def plan_step(card: Card, setup: StepSetup) -> float:
    """Seconds of a step, as the planner has them, all ranks on one machine.

    Args:
        card: the card of each rank.
        setup: the step as the planner sees it.
    """
    return plan_pace(setup, Cluster(card, setup.world_size, setup.world_size)).step_s


def fit_reach(card: Card, steps: Sequence[MeasuredStep]) -> tuple[float, float]:
    """Share of the peak rate with which planned steps are what was measured, and their spread.

    Args:
        card: the card, with its measured rates.
        steps: steps that were measured on it, at least one.

    Returns:
        The share of matrix products, between 0 and 1, and the largest factor by which one of the
        steps is still off with it.
    """
    shares = []
    for setup, seconds in steps:
        recomputed = setup.passes.recomputed / setup.passes.forward
        work = architecture.step_work(setup.shape, setup.number_bytes, recomputed)
        at_peak_s = work.linear * setup.images / card.peak_rate(setup.precision)
        beside_s = plan_step(card, setup) - at_peak_s / card.reach.products
        if seconds > beside_s:
            shares.append(min(at_peak_s / (seconds - beside_s), 1.0))
    if not shares:  # all else alone takes longer than the steps did: the rates are not of this card
        return card.reach.products, math.inf
    products = math.exp(math.fsum(map(math.log, shares)) / len(shares))
    fitted = replace(card, reach=replace(card.reach, products=products))
    ratios = [plan_step(fitted, setup) / seconds for setup, seconds in steps]
    return products, max(_LEAST_SPREAD, *ratios, *(1 / ratio for ratio in ratios))
