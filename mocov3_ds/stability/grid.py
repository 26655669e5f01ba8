"""Which runs does a study need? Grids as TOML files: what varies, what stays, at which scale.

    title = "Beta2 at two rates"
    about = "What the grid asks."
    seeds = 3                       # seeds 0, 1, 2 (--seeds gives another number); or [6, 7, 8]
    effect = 2.0                    # points of k-NN accuracy that it wants to tell, if any, and the
    spread = 1.5                    # deviation of paired differences, in points, if it was measured
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

    [scale.tiny]                    # what differs at a scale: base is merged, `about` goes on, an
    base = { recipe = "tiny" }      # axis of the same name, the arms and numbers are replaced
    axes = { batch = [64, 128] }
    change = { "short memory" = { beta2 = 0.9 } }   # settings of an arm of the file

`[[comparisons]]` say beforehand what the page tests (`planned.py`).

A setting is a flag of train.py (`epochs`, `model.dim`, `views.fixed`) or one of the words of
`cell_flags`, which spare the optimizer block of the DeepSpeed JSON.
"""

import contextlib
import dataclasses
import io
import itertools
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mocov3_ds.config.run_config import Settings
from mocov3_ds.optim.build import check_block
from mocov3_ds.recipes import parse
from mocov3_ds.settings.spelling import did_you_mean
from mocov3_ds.stability import grid_file
from mocov3_ds.stability.cell_flags import Overrides, patch_rate, settings_flags
from mocov3_ds.stability.grid_file import Arm
from mocov3_ds.stability.grid_options import Scale
from mocov3_ds.stability.planned import PlannedComparison, read_planned

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCALES: tuple[str, ...] = get_args(Scale)
GRIDS = Path(__file__).parent / "grids"

_SCALE_KEYS = (
    *("about", "seeds", "twins", "effect", "spread"),
    *("base", "axes", "arms", "change", "comparisons"),
)
_FILE_KEYS = ("title", *(key for key in _SCALE_KEYS if key != "change"), "scale")


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
        """Seed of the initialisation, the order and the views."""
        return int(self.settings["seed"])

    @property
    def frozen(self) -> bool:
        """Whether the patch projection is not trained."""
        return patch_rate(self.settings) == 0

    def flags(self) -> list[str]:
        """Its settings as flags of train.py."""
        return settings_flags(self.settings)


@dataclass(frozen=True)
class Grid:
    """A grid at one scale."""

    name: str
    scale: str
    title: str
    about: str
    """what the grid asks, a sentence or two"""
    cells: tuple[Cell, ...]
    planned: tuple[PlannedComparison, ...] = ()
    """comparisons that its page tests; none = all of `comparisons.list_pairs`"""
    file: str = ""
    """path of the TOML file, if it is from one"""
    effect: float = 0.0
    """difference that it wants to tell, in points of k-NN accuracy; 0 = it does not say"""
    spread: float = 0.0
    """standard deviation over seeds of such differences, in points, as measured; 0 = unknown"""


def list_grids() -> list[str]:
    """Names of the ready grids."""
    return sorted(path.stem for path in GRIDS.glob("*.toml"))


def load_grid(name: str, scale: str, seeds: int | None = None) -> Grid:
    """Read a grid, lay out its cells at a scale, and check each as train.py would.

    Args:
        name: name of a ready grid, or path of a TOML file.
        scale: one of `SCALES`: tiny, cifar or imagenet.
        seeds: runs of each cell; None = what the file says (or 3).

    Raises:
        ValueError: there is no such grid, a key is unknown, or settings are impossible.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = GRIDS / f"{name}.toml"
        if not path.exists():
            raise ValueError(
                f"no grid {name!r}{did_you_mean(name, list_grids())}; there are "
                f"{', '.join(list_grids())}, and any TOML file."
            )
    try:
        tree = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no grid file {path}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}.") from None
    grid = dataclasses.replace(lay_out(tree, path.stem, scale, seeds), file=str(path.resolve()))
    for cell in grid.cells:
        if cell.seed == grid.cells[0].seed:
            check_cell(cell, path.name)
    return grid


def lay_out(tree: Mapping[str, Any], name: str, scale: str, seeds: int | None = None) -> Grid:
    """The cells of a grid's TOML tree, without running any.

    Args:
        tree: content of the TOML file.
        name: name of the grid; errors begin with it.
        scale: one of `SCALES`: tiny, cifar or imagenet.
        seeds: runs of each cell; None = what the file says (or 3).

    Raises:
        ValueError: a key or a value is wrong; the sentence names it.
    """
    if scale not in SCALES:
        raise ValueError(f"no scale {scale!r}{did_you_mean(scale, SCALES)}; there are {SCALES}.")
    try:
        cells = _lay_out_cells(tree, scale, seeds)
        changes = grid_file.read_table(grid_file.read_table(tree, "scale"), scale)
        merged = {**tree, **changes}
        labels = [*dict.fromkeys(cell.label for cell in cells)]
        abouts = (grid_file.read_text(table, "about", "").strip() for table in (tree, changes))
        return Grid(
            name,
            scale,
            title=grid_file.read_text(tree, "title", name),
            about=" ".join(filter(None, abouts)),
            cells=cells,
            planned=read_planned(merged.get("comparisons"), labels),
            effect=grid_file.read_points(merged, "effect"),
            spread=grid_file.read_points(merged, "spread"),
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _lay_out_cells(tree: Mapping[str, Any], scale: str, seeds: int | None) -> tuple[Cell, ...]:
    grid_file.check_keys(tree, _FILE_KEYS, "the file")
    scales = grid_file.read_table(tree, "scale")
    grid_file.check_keys(scales, SCALES, "[scale]")
    changes = grid_file.read_table(scales, scale)
    grid_file.check_keys(changes, _SCALE_KEYS, f"[scale.{scale}]")
    merged = {**tree, **changes}
    base, axes = (
        {**grid_file.read_table(tree, key), **grid_file.read_table(changes, key)}
        for key in ("base", "axes")
    )
    grid_file.check_settings(base, "[base]")
    grid_file.check_axes(axes, "[axes]")
    arms = grid_file.change_arms(
        grid_file.read_arms(merged.get("arms")),
        grid_file.read_table(changes, "change"),
        f"[scale.{scale}.change]",
    )
    all_seeds = grid_file.read_seeds(merged, seeds)
    with_twin = grid_file.read_twins(merged, arms)
    cells: dict[str, Cell] = {}
    for arm in arms:
        for cell in _arm_cells(arm, base, axes, all_seeds, arm.name in with_twin):
            _check_same_run(cells.setdefault(cell.name, cell), cell)
    if not cells:
        raise ValueError("the grid has no cells; an axis is empty.")
    linked = [_link_twin(cell, cells.values()) for cell in cells.values()]
    # a grid that is stopped early has whole seeds rather than whole arms
    return tuple(sorted(linked, key=lambda cell: cell.seed))


def _arm_cells(
    arm: Arm,
    base: Overrides,
    axes: Mapping[str, list[Any]],
    seeds: Sequence[int],
    with_twin: bool,
) -> Iterator[Cell]:
    """A cell for each combination and seed, each followed by its frozen twin `with_twin`."""
    all_axes = {**axes, **arm.axes}
    for values in itertools.product(*all_axes.values()):
        on_axes = dict(zip(all_axes, values, strict=True))
        settings, varied = {**base, **arm.settings, **on_axes}, {**arm.settings, **on_axes}
        variants = [({"patch": "trained", **settings}, varied)]
        if with_twin:
            variants.append(({**settings, "patch": "frozen"}, {**varied, "patch": "frozen"}))
        for seed in seeds:
            for complete, different in variants:
                label = _label(arm.name, different, all_axes)
                name = f"{_slug(label)}_seed-{seed}"
                yield Cell(name, label, {**complete, "seed": seed}, different)


def _check_same_run(first: Cell, second: Cell) -> None:
    """Two cells of one name must be one run, e.g. a twin and the same value of an axis.

    Raises:
        ValueError: they are not, so one of them would be lost.
    """
    a, b = ({**cell.settings, "patch": patch_rate(cell.settings)} for cell in (first, second))
    if first.label == second.label and a == b:
        return
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    one, two = (
        f"{cell.label!r} ({', '.join(f'{key} {tree.get(key)!r}' for key in keys) or 'the same'})"
        for cell, tree in ((first, a), (second, b))
    )
    raise ValueError(
        f"{one} and {two} would both be called {first.name}; give the arms names that differ in "
        "letters or digits, or the axis values that differ in six digits."
    )


def _link_twin(cell: Cell, cells: Iterable[Cell]) -> Cell:
    """The cell, with the name of the one that differs by the frozen patch projection alone."""
    twin = {**cell.settings, "patch": "frozen"}
    names = [c.name for c in cells if c is not cell and {**c.settings} == twin]
    return dataclasses.replace(cell, twin=names[0]) if names else cell


def check_cell(cell: Cell, file_name: str) -> Settings:
    """What train.py makes of a cell's flags; errors begin with `file_name`.

    Raises:
        ValueError: it would refuse them; the sentence names cell and setting.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            settings = parse([*cell.flags(), "--name", cell.name])
        check_block(settings.engine.get("optimizer"))
    except SystemExit:
        reason = " ".join(re.sub(r"[─│╭╮╰╯]|-{4,}", " ", printed.getvalue()).split())
        raise ValueError(f"{file_name}, cell {cell.name}: {reason}") from None
    except ValueError as error:
        raise ValueError(f"{file_name}, cell {cell.name}: {error}") from None
    return settings


def _label(arm: str, varied: Overrides, axes: Collection[str]) -> str:
    """The arm's name and what varies within it, e.g. `LAMB, lr 5e-04, frozen`.

    That the patch projection is frozen is not said again where the arm's name says it.
    """
    terms = [arm] if arm else []
    for key, value in varied.items():
        if key == "patch":
            term = "frozen" if patch_rate(varied) == 0 else f"patch rate {value}"
            if value != "trained" and f" {term} " not in f" {arm} ":
                terms.append(term)
        elif key in axes or key in ("lr", "batch"):
            terms.append(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(terms) or "as it is"


def _slug(label: str) -> str:
    return re.sub(r"[^a-z0-9.+_-]+", "-", label.lower().replace(", ", "_")).strip("-")
