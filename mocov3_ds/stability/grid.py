"""Grids of runs as TOML files: what varies, what stays, and at which scale.

    title = "Beta2 at two rates"
    about = "What the grid asks."
    seeds = 3                       # seeds 0, 1, 2 (--seeds gives another number)
    twins = true                    # each cell again with a frozen patch projection; or arm names

    [base]                          # settings of every cell
    recipe = "vit_b16"
    lr = 1e-4                       # base rate, per 256 images
    [axes]                          # all combinations
    batch = [1024, 4096]
    [[arms]]                        # named alternatives, each combined with the axes
    name = "short memory"
    beta2 = 0.95
    axes = { lr = [1e-4, 2e-4] }    # of this arm alone

    [scale.tiny]                    # what differs at a scale: base is merged, an axis of the same
    base = { recipe = "tiny" }      # name and the arms are replaced
    axes = { batch = [64, 128] }

A setting is a flag of train.py (`epochs`, `model.dim`, `views.fixed`) or one of the words below,
which spare the optimizer block of the DeepSpeed JSON.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mocov3_ds.config import RECIPES, Config, Settings, parse
from mocov3_ds.optim.build import build_optimizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Scale = Literal["tiny", "cifar", "imagenet"]
SCALES: tuple[str, ...] = get_args(Scale)
GRIDS = Path(__file__).parent / "grids"

_OPTIMIZER_WORDS = {
    "lr": "base learning rate, per 256 images",
    "weight_decay": "weight decay",
    "beta1": "decay of the first moment",
    "beta2": "decay of the second moment",
    "eps": "added to the root",
    "update_clip": "StableAdamW: shorten a tensor's step by its RMS of g / sqrt(v) above 1",
    "trust_clip": "[low, high] of the trust ratio of LAMB and LARS",
    "trust_coeff": "LARS's coefficient",
    "sgd_momentum": "LARS's momentum",
}
_WORDS = {
    **_OPTIMIZER_WORDS,
    "optimizer": "AdamW, Lamb or Lars",
    "patch": "patch projection: trained, frozen, or its rate relative to the others",
    "warmup": "warm-up as a share of the epochs",
    "qk_norm": "normalise queries and keys of the attention",
    "gradient_clipping": "DeepSpeed's bound of the global gradient norm",
}
_NOT_OF_A_GRID = {
    "seed": "--seeds says how many",
    "name": "each cell has its own",
    "runs": "--runs says where",
    "ds": "use the words lr, beta2, ... instead",
    "deepspeed_config": "use the words lr, beta2, ... instead",
}
_REPEATED = ("model.group_lr",)  # flags that are given once a value
_TOP = ("title", "about", "seeds", "twins", "base", "axes", "arms", "scale")
_OF_A_SCALE = ("base", "axes", "arms", "seeds", "twins")

Overrides = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    name: str
    """folder of the run"""
    label: str
    """what sets it apart from other cells, for people; equal for all seeds"""
    settings: Overrides
    """all settings, `seed` included"""
    varied: Overrides
    """those that differ between cells, without `seed`"""
    twin: str = ""
    """name of the cell that differs by the frozen patch projection alone"""

    @property
    def seed(self) -> int:
        """Of the initialisation, the order and the views."""
        return int(self.settings["seed"])

    @property
    def frozen(self) -> bool:
        """Whether the patch projection is not trained."""
        return patch_rate(self.settings) == 0

    def flags(self) -> list[str]:
        """Its settings as flags of train.py."""
        return flags(self.settings)


@dataclass(frozen=True)
class Grid:
    """A grid at one scale."""

    name: str
    scale: str
    title: str
    about: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class _Arm:
    name: str = ""
    settings: Overrides = field(default_factory=dict)
    axes: Mapping[str, list[Any]] = field(default_factory=dict)


def packaged() -> list[str]:
    """Names of the ready grids."""
    return sorted(path.stem for path in GRIDS.glob("*.toml"))


def load(name: str, scale: str, seeds: int | None = None) -> Grid:
    """Read a grid, lay out its cells at a scale, and check each as train.py would.

    Args:
        name: a ready grid's, or a TOML file.
        scale: one of `SCALES`.
        seeds: of each cell; None = what the file says (or 3).

    Raises:
        ValueError: no such grid, a key that is not known, or settings that cannot be.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = GRIDS / f"{name}.toml"
        if not path.exists():
            raise ValueError(
                f"no grid {name!r}{_meant(name, packaged())}; there are {', '.join(packaged())}, "
                "and any TOML file."
            )
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no grid file {path}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from None
    grid = lay_out(tree, path.stem, scale, seeds)
    for cell in grid.cells:
        if cell.seed == 0:
            check(cell, path.name)
    return grid


def lay_out(tree: Mapping[str, Any], name: str, scale: str, seeds: int | None = None) -> Grid:
    """The cells of a grid's TOML tree, without running any.

    Raises:
        ValueError: names the wrong key.
    """
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}{_meant(scale, SCALES)}; there are {SCALES}.")
    _known(tree, _TOP, name, "the file")
    scales = _table(tree, "scale", name)
    _known(scales, SCALES, name, "[scale]")
    own = _table(scales, scale, name)
    _known(own, _OF_A_SCALE, name, f"[scale.{scale}]")
    base = {**_table(tree, "base", name), **_table(own, "base", name)}
    axes = {**_table(tree, "axes", name), **_table(own, "axes", name)}
    arms = _arms(own.get("arms", tree.get("arms")), name)
    _settings_known(base, name, "[base]")
    _axes_known(axes, name, "[axes]")
    count = seeds if seeds is not None else own.get("seeds", tree.get("seeds", 3))
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: seeds is {count!r}; it must be a number of 1 or more.")
    twins = own.get("twins", tree.get("twins", True))
    if not isinstance(twins, bool):
        if not isinstance(twins, list) or not all(isinstance(twin, str) for twin in twins):
            raise ValueError(f"{name}: twins is {twins!r}; it is true, false or names of arms.")
        _known(dict.fromkeys(twins), [arm.name for arm in arms], name, "twins")
    title, about = _text(tree, "title", name, name), _text(tree, "about", "", name)
    unique: dict[str, Cell] = {}
    for arm in arms:
        with_twin = twins if isinstance(twins, bool) else arm.name in twins
        for varied in _products({**axes, **arm.axes}):
            settings = {**base, **arm.settings, **varied}
            different = {**arm.settings, **varied}
            for cell in _cells(arm.name, settings, different, {*varied}, count, with_twin):
                _one_run(unique.setdefault(cell.name, cell), cell, name)
    if not unique:
        raise ValueError(f"{name}: the grid has no cells; an axis is empty.")
    linked = [_with_twin(cell, unique.values()) for cell in unique.values()]
    # a grid that is stopped early has whole seeds rather than whole arms
    ordered = tuple(sorted(linked, key=lambda cell: cell.seed))
    return Grid(name, scale, title, about.strip(), ordered)


def _cells(
    arm: str,
    settings: Overrides,
    varied: Overrides,
    axes: Collection[str],
    seeds: int,
    with_twin: bool,
) -> Iterator[Cell]:
    """A cell for each seed, each followed by its frozen twin where that is wanted."""
    variants = [({"patch": "trained", **settings}, varied)]
    if with_twin:
        variants.append(({**settings, "patch": "frozen"}, {**varied, "patch": "frozen"}))
    for seed in range(seeds):
        for whole, different in variants:
            label = _label(arm, different, axes)
            yield Cell(f"{_slug(label)}_seed-{seed}", label, {**whole, "seed": seed}, different)


def _one_run(first: Cell, second: Cell, name: str) -> None:
    """Two cells of one name must be one run, e.g. a twin and the same value of an axis.

    Raises:
        ValueError: they are not, so one of them would be lost.
    """
    a, b = ({**cell.settings, "patch": patch_rate(cell.settings)} for cell in (first, second))
    if first.label == second.label and a == b:
        return
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    one, other = (
        f"{cell.label!r} ({', '.join(f'{key} {tree.get(key)!r}' for key in keys) or 'the same'})"
        for cell, tree in ((first, a), (second, b))
    )
    raise ValueError(
        f"{name}: {one} and {other} would both be called {first.name}; give the arms names that "
        "differ in letters or digits, or the axis values that differ in six digits."
    )


def _with_twin(cell: Cell, cells: Iterable[Cell]) -> Cell:
    """The cell, told which other one differs by the frozen patch projection alone."""
    twin = {**cell.settings, "patch": "frozen"}
    names = [c.name for c in cells if c is not cell and {**c.settings} == twin]
    return dataclasses.replace(cell, twin=names[0]) if names else cell


def patch_rate(settings: Overrides) -> float:
    """Rate of the patch projection relative to the others; 0 = frozen."""
    value = settings.get("patch", "trained")
    return {"trained": 1.0, "frozen": 0.0}[value] if isinstance(value, str) else float(value)


def flags(settings: Overrides) -> list[str]:
    """Overrides as flags of train.py.

    The optimizer block is given whole, so that nothing of the recipe's is left in it.
    """
    words = dict(settings)
    out: list[str] = []
    recipe = words.pop("recipe", "tiny")
    out += ["--recipe", recipe]
    block = _optimizer_block(words, recipe)
    out += ["--ds", f"optimizer={json.dumps(block)}"]
    if "gradient_clipping" in words:
        out += ["--ds", f"gradient_clipping={words.pop('gradient_clipping')}"]
    out += ["--model.patch_lr", f"{patch_rate(words):g}"]
    words.pop("patch", None)
    if "qk_norm" in words:
        words["model.qk_norm"] = words.pop("qk_norm")
    if "warmup" in words:
        epochs = words.get("epochs", RECIPES[recipe].config.epochs)
        words["warmup_epochs"] = words.pop("warmup") * epochs
    for key, value in words.items():
        out += flag(key, value)
    return out


def _optimizer_block(words: dict[str, Any], recipe: str) -> dict[str, Any]:
    """Takes the optimizer's words out of `words`; what is not given is the recipe's, if it fits."""
    theirs = RECIPES[recipe].engine["optimizer"]
    kind = words.pop("optimizer", theirs["type"])
    given = {word: words.pop(word) for word in _OPTIMIZER_WORDS if word in words}
    params = {"lr": theirs["params"]["lr"]}
    if kind.lower() == theirs["type"].lower():
        params = dict(theirs["params"])
    if {"beta1", "beta2"} & {*given}:
        beta1, beta2 = params.get("betas", (0.9, 0.999))
        params["betas"] = [given.pop("beta1", beta1), given.pop("beta2", beta2)]
    if "sgd_momentum" in given:
        params["momentum"] = given.pop("sgd_momentum")
    return {"type": kind, "params": {**params, **given}}


def flag(key: str, value: Any) -> list[str]:
    """One setting of `Config` as flags."""
    if isinstance(value, bool):
        path, _, leaf = key.rpartition(".")
        spelled = leaf if value else f"no-{leaf}"
        return [f"--{path}.{spelled}" if path else f"--{spelled}"]
    if key in _REPEATED:
        return [word for one in value for word in (f"--{key}", str(one))]
    if isinstance(value, list | tuple):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}", str(value)]


def check(cell: Cell, where: str) -> Settings:
    """What train.py makes of a cell's flags.

    Raises:
        ValueError: it would refuse them; the sentence names cell and setting.
    """
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(words):
            run = parse([*cell.flags(), "--name", cell.name])
        dummy = torch.nn.Parameter(torch.zeros(2, 2))
        build_optimizer(run.engine.get("optimizer"), [("weight", dummy)])
    except SystemExit:
        reason = " ".join(re.sub(r"[─│╭╮╰╯]|-{4,}", " ", words.getvalue()).split())
        raise ValueError(f"{where}, cell {cell.name}: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{where}, cell {cell.name}: {error}") from None
    return run


# ------------------------------------------------------------------------------------ reading


def _arms(trees: Any, name: str) -> list[_Arm]:
    if trees is None:
        return [_Arm()]
    if not isinstance(trees, list) or not all(isinstance(tree, dict) for tree in trees):
        raise ValueError(f"{name}: arms are tables; write [[arms]] above each.")
    arms = []
    for number, tree in enumerate(trees):
        if not isinstance(tree.get("name"), str) or not tree["name"]:
            raise ValueError(f"{name}: arm {number + 1} has no name.")
        where = f"arm {tree['name']!r}"
        settings = {key: value for key, value in tree.items() if key not in ("name", "axes")}
        axes = _table(tree, "axes", name)
        _settings_known(settings, name, where)
        _axes_known(axes, name, where)
        arms.append(_Arm(tree["name"], settings, axes))
    if len({arm.name for arm in arms}) != len(arms):
        raise ValueError(f"{name}: two arms have one name.")
    return arms


def _table(tree: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    value = tree.get(key, {})
    if not isinstance(value, dict):
        raise ValueError(f"{name}: {key} is {value!r}, not a table.")
    return value


def _text(tree: Mapping[str, Any], key: str, default: str, name: str) -> str:
    value = tree.get(key, default)
    if not isinstance(value, str):
        raise ValueError(f"{name}: {key} is {value!r}, not a text.")
    return value


def _known(tree: Mapping[str, Any], known: Sequence[str], name: str, where: str) -> None:
    for key in tree:
        if key not in known:
            raise ValueError(
                f"{name}: {where} has an unknown key {key!r}{_meant(key, known)}; known: "
                f"{', '.join(known)}."
            )


def _settings_known(settings: Overrides, name: str, where: str) -> None:
    for key in settings:
        _setting_known(key, name, where)
    patch = settings.get("patch", "trained")
    if patch not in ("trained", "frozen") and not (_is_number(patch) and 0 <= patch <= 1):
        raise ValueError(
            f"{name}: {where} has patch = {patch!r}; it is 'trained', 'frozen' or a rate from 0 "
            "to 1."
        )
    for key in ("epochs", "warmup", "gradient_clipping"):
        value = settings.get(key, 0)
        if not (_is_number(value) and value >= 0):
            raise ValueError(
                f"{name}: {where} has {key} = {value!r}; it must be a number of 0 or more."
            )
    kind = settings.get("optimizer", "")
    if not isinstance(kind, str):
        raise ValueError(f"{name}: {where} has optimizer = {kind!r}; it is {_WORDS['optimizer']}.")
    recipe = settings.get("recipe", "tiny")
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ValueError(
            f"{name}: {where} has recipe = {recipe!r}{_meant(str(recipe), RECIPES)}; there are "
            f"{', '.join(RECIPES)}."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _axes_known(axes: Mapping[str, Any], name: str, where: str) -> None:
    for key, values in axes.items():
        _setting_known(key, name, where)
        if not isinstance(values, list):
            raise ValueError(f"{name}: {where} has {key} = {values!r}; an axis is a list.")
        for value in values:
            _settings_known({key: value}, name, where)


def _setting_known(key: str, name: str, where: str) -> None:
    if key in _NOT_OF_A_GRID:
        raise ValueError(f"{name}: {where} sets {key!r}; {_NOT_OF_A_GRID[key]}.")
    known = [*_WORDS, *_config_keys()]
    if key not in known:
        raise ValueError(
            f"{name}: {where} has an unknown setting {key!r}{_meant(key, known)}; it takes the "
            f"words {', '.join(_WORDS)} and each flag of train.py."
        )


def _config_keys() -> list[str]:
    keys = []
    for entry in dataclasses.fields(Config):
        default = entry.default_factory() if callable(entry.default_factory) else entry.default
        if dataclasses.is_dataclass(default):
            keys += [f"{entry.name}.{leaf.name}" for leaf in dataclasses.fields(default)]
        else:
            keys.append(entry.name)
    return keys


def _meant(key: str, known: Any) -> str:
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    if not close:  # a flag's last word, without its group
        close = [name for name in known if name.rpartition(".")[2] == key][:1]
    return f" (did you mean {close[0]}?)" if close else ""


def _products(axes: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _label(arm: str, varied: Overrides, axes: Collection[str]) -> str:
    """The arm's name and what varies within it, e.g. `LAMB, lr 5e-04, frozen`."""
    parts = [arm] if arm else []
    for key, value in varied.items():
        if key == "patch":
            parts += {"trained": [], "frozen": ["frozen"]}.get(
                value if isinstance(value, str) else ("frozen" if value == 0 else ""),
                [f"patch rate {value}"],
            )
        elif key in axes or key in ("lr", "batch"):
            parts.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(parts) or "as it is"


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.+_-]+", "-", label.lower().replace(", ", "_")).strip("-")
