"""The house rules that a tool can hold: who may import whom, and how large and named things are.

`python tests/house/measure.py --list PATH` says what stands out in a file or folder.
"""

import pkgutil
import re
from pathlib import Path

import pytest

from tests.house.measure import House, circles, measure, room, rooms, table

ROOT = Path(__file__).parents[1]

FLOORS = (
    ("version",),
    ("settings",),
    ("distributed",),
    ("data", "model", "optim"),
    ("config",),
    ("recipes",),
    ("checkpoints", "planning"),
    ("encoders",),
    ("evaluation",),
    ("monitoring",),
    ("training",),
    ("faults",),
    ("bench", "checks", "launch", "stability"),
    ("cli", "doctor", "pretraining", "train", "mocov3_ds"),
)
"""The rooms from the ground up; imports lead downwards, or sideways on a floor without a circle."""

DATA_PREP_IMPORTS = {"data", "settings", "version"}
DATA_PREP_IMPORTERS = {"training", *FLOORS[-2], *FLOORS[-1]}
"""training only for what a run shards itself: drawn sample images, a folder of images"""


@pytest.fixture(scope="module")
def house() -> House:
    return measure(ROOT)


def short(name: str) -> str:
    return name.removeprefix("mocov3_ds.")


def test_imports_lead_downwards(house: House) -> None:
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    graph = rooms(house.imports)
    assert {short(name) for name in graph} == {*floor, "data_prep"}, "each room has its floor"
    upwards = [
        f"{module} imports {target}"
        for module, targets in house.imports.items()
        for target in targets
        if "data_prep" not in (room(module), room(target))
        and floor[short(room(module))] < floor[short(room(target))]
    ]
    assert upwards == []


def test_data_prep_is_a_one_way_street(house: House) -> None:
    graph = {short(name): {*map(short, targets)} for name, targets in rooms(house.imports).items()}
    assert graph["data_prep"] <= DATA_PREP_IMPORTS
    assert {name for name in graph if "data_prep" in graph[name]} <= DATA_PREP_IMPORTERS
    from_training = {
        target
        for module, targets in house.imports.items()
        for target in targets
        if room(module) == "mocov3_ds.training" and room(target) == "data_prep"
    }
    assert from_training <= {"data_prep.drawn_samples", "data_prep.own_shards"}


def test_there_are_no_circles(house: House) -> None:
    """Late imports and those for typing count, too."""
    assert circles(house.imports) == []
    assert circles(rooms(house.imports)) == []


def test_goals_are_met(house: House) -> None:
    missed = {row.name: f"{row.text}, goal {row.goal}" for row in table(house) if not row.is_met}
    assert missed == {}


def test_the_map_names_every_room(house: House) -> None:
    path = ROOT / "mocov3_ds" / "README.md"
    if path.exists():
        cells = [line.split("|")[1] for line in path.read_text().splitlines() if line[:1] == "|"]
        named = {word for cell in cells for word in re.findall(r"[a-z_]+", cell)}
        assert {short(name) for name in rooms(house.imports)} - {"mocov3_ds"} <= named


def test_names_in_the_chapters_exist() -> None:
    chapters = [
        *ROOT.glob("*.md"),
        *ROOT.glob("mocov3_ds/**/*.md"),
        *ROOT.glob("data_prep/**/*.md"),
    ]
    text = "\n".join(chapter.read_text() for chapter in chapters)
    names = {*re.findall(r"\bmocov3_ds(?:\.\w+)+", text)}
    assert len(names) > 5
    for name in sorted(names):
        pkgutil.resolve_name(name)
