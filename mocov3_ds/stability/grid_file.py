"""Is a grid's TOML file right? Its tables read, each key and setting checked.

Every error is one sentence that names the place and the key, without the name of the file.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mocov3_ds.config.run_config import Config
from mocov3_ds.optim.build import list_types
from mocov3_ds.recipes import RECIPES
from mocov3_ds.settings.spelling import did_you_mean
from mocov3_ds.stability.cell_flags import WORDS, Overrides, flatten_config, optimizer_words

_NO_SETTINGS = {
    "seed": "--seeds says how many",
    "name": "each cell has its own",
    "runs": "--runs says where",
    "ds": "use the words lr, beta2, ... instead",
    "deepspeed_config": "use the words lr, beta2, ... instead",
}
"""flags of train.py that a grid must not set, and why"""


@dataclass(frozen=True)
class Arm:
    """A named alternative; the only arm of a grid without arms has no name."""

    name: str = ""
    settings: Overrides = field(default_factory=dict)
    axes: Mapping[str, list[Any]] = field(default_factory=dict)
    """axes of this arm alone: setting -> its values"""


def read_arms(trees: Any) -> list[Arm]:
    """The arms of a file, or one without a name where it has none.

    Raises:
        ValueError: the arms are no tables, have no name or the same, or a setting is wrong.
    """
    if trees is None:
        return [Arm()]
    if not isinstance(trees, list) or not all(isinstance(tree, dict) for tree in trees):
        raise ValueError("arms are tables; write [[arms]] above each.")
    arms = []
    for number, tree in enumerate(trees):
        if not isinstance(tree.get("name"), str) or not tree["name"]:
            raise ValueError(f"arm {number + 1} has no name.")
        location = f"arm {tree['name']!r}"
        settings = {key: value for key, value in tree.items() if key not in ("name", "axes")}
        axes = read_table(tree, "axes")
        check_settings(settings, location)
        check_axes(axes, location)
        arms.append(Arm(tree["name"], settings, axes))
    if len({arm.name for arm in arms}) != len(arms):
        raise ValueError("two arms have one name.")
    return arms


def change_arms(arms: Sequence[Arm], changes: Mapping[str, Any], place: str) -> list[Arm]:
    """The arms with other settings at a scale.

    Args:
        arms: those of the file.
        changes: name of an arm -> its settings that differ.
        place: where the changes stand.

    Raises:
        ValueError: there is no such arm, or a setting is wrong.
    """
    check_keys(changes, [arm.name for arm in arms], place)
    for name in changes:
        check_settings(read_table(changes, name), f"{place}, arm {name!r},")
    return [
        dataclasses.replace(arm, settings={**arm.settings, **changes.get(arm.name, {})})
        for arm in arms
    ]


def read_table(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A table of the file; empty where the key is missing.

    Raises:
        ValueError: the value is no table.
    """
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r}, not a table.")
    return value


def read_text(tree: Mapping[str, Any], key: str, default: str) -> str:
    """A text of the file.

    Raises:
        ValueError: the value is no text.
    """
    value = tree.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{key} is {value!r}, not a text.")
    return value


def read_seeds(tree: Mapping[str, Any], count: int | None) -> Sequence[int]:
    """Seeds of the runs: the first `count`, else what the file says, else 0, 1 and 2.

    A file says how many, or lists them: a second study wants other ones than the first.

    Raises:
        ValueError: it is neither a number of 1 or more nor a list of different seeds.
    """
    seeds = tree.get("seeds", 3)
    if isinstance(seeds, list):
        if not seeds or len({*seeds}) < len(seeds) or not all(map(_is_seed, seeds)):
            raise ValueError(f"seeds is {seeds!r}; a list has different numbers of 0 or more.")
        if count is not None and count > len(seeds):
            raise ValueError(f"--seeds {count} is more than the {len(seeds)} that the file lists.")
        return seeds if count is None else seeds[:count]
    seeds = seeds if count is None else count
    if not _is_seed(seeds) or seeds < 1:
        raise ValueError(f"seeds is {seeds!r}; it must be a number of 1 or more.")
    return range(seeds)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_points(tree: Mapping[str, Any], key: str) -> float:
    """A number of points of accuracy; 0 where the file does not say.

    Raises:
        ValueError: it is no number of 0 or more.
    """
    points = tree.get(key, 0)
    if not (_is_number(points) and points >= 0):
        raise ValueError(f"{key} is {points!r}; it must be a number of points, 0 or more.")
    return float(points)


def read_twins(tree: Mapping[str, Any], arms: Sequence[Arm]) -> list[str]:
    """Names of the arms whose cells have a frozen twin; all arms by default.

    Raises:
        ValueError: `twins` is neither true, false nor a list of names of arms.
    """
    names = [arm.name for arm in arms]
    twins = tree.get("twins", True)
    if isinstance(twins, bool):
        return names if twins else []
    if not isinstance(twins, list) or not all(isinstance(twin, str) for twin in twins):
        raise ValueError(f"twins is {twins!r}; it is true, false or names of arms.")
    check_keys(twins, names, "twins")
    return twins


def check_keys(keys: Sequence[str] | Mapping[str, Any], known: Sequence[str], place: str) -> None:
    """Refuse a key that is not known; `place` is where the keys stand, e.g. `[base]`.

    Raises:
        ValueError: a key is unknown.
    """
    for key in keys:
        if key not in known:
            raise ValueError(
                f"{place} has an unknown key {key!r}{did_you_mean(key, known)}; known: "
                f"{', '.join(known)}."
            )


def check_settings(settings: Overrides, place: str) -> None:
    """Refuse settings that no cell can have; `place` is where they stand, e.g. `[base]`.

    Raises:
        ValueError: a setting is unknown, not for grids, or has an impossible value.
    """
    for key in settings:
        _check_setting_name(key, place)
    patch = settings.get("patch", "trained")
    if patch not in ("trained", "frozen") and not (_is_number(patch) and 0 <= patch <= 1):
        raise ValueError(
            f"{place} has patch = {patch!r}; it is 'trained', 'frozen' or a rate from 0 to 1."
        )
    for key in ("epochs", "warmup", "gradient_clipping"):
        value = settings.get(key, 0)
        if not (_is_number(value) and value >= 0):
            raise ValueError(f"{place} has {key} = {value!r}; it must be a number of 0 or more.")
    kind = settings.get("optimizer", "")
    if not isinstance(kind, str):
        raise ValueError(f"{place} has optimizer = {kind!r}; it is one of {list_types()}.")
    recipe = settings.get("recipe", "tiny")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(
            f"{place} has recipe = {recipe!r}{did_you_mean(str(recipe), RECIPES)}; there are "
            f"{', '.join(RECIPES)}."
        )


def check_axes(axes: Mapping[str, Any], place: str) -> None:
    """Refuse axes that are no lists of possible settings; `place` is where they stand.

    Raises:
        ValueError: an axis is no list, or one of its values cannot be.
    """
    for key, values in axes.items():
        _check_setting_name(key, place)
        if not isinstance(values, list):
            raise ValueError(f"{place} has {key} = {values!r}; an axis is a list.")
        for value in values:
            check_settings({key: value}, place)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_setting_name(key: str, place: str) -> None:
    if key in _NO_SETTINGS:
        raise ValueError(f"{place} sets {key!r}; {_NO_SETTINGS[key]}.")
    grid_words = [*optimizer_words(), *WORDS]
    names = [*grid_words, *(name for name, _ in flatten_config(Config()))]
    if key in names:
        return
    hint = did_you_mean(key, names)
    if not hint:  # a flag's last word, without its group
        hint = next((f" (did you mean {n}?)" for n in names if n.rpartition(".")[2] == key), "")
    raise ValueError(
        f"{place} has an unknown setting {key!r}{hint}; it takes the words "
        f"{', '.join(grid_words)} and each flag of train.py."
    )
