"""`mocov3 report RUN`: one page about one run, which loads nothing else and opens anywhere."""

import io
import json
import logging
import math
import shlex
import threading
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Annotated, Any

import tyro
from PIL import Image

from mocov3_ds.checkpoints.run_status import FINISHED_STATUS, describe_status
from mocov3_ds.config.run_config import Settings
from mocov3_ds.data.storage import atomic
from mocov3_ds.monitoring.metrics_file import Row
from mocov3_ds.monitoring.run_facts import flatten_facts, read_facts
from mocov3_ds.monitoring.run_log import PLAN
from mocov3_ds.monitoring.run_review import RunReview
from mocov3_ds.recipes import RECIPES
from mocov3_ds.stability import run_figures
from mocov3_ds.stability.page import build_document, bullet_list, embed_picture, wrap_table
from mocov3_ds.stability.pictures import Picture, PictureKind
from mocov3_ds.stability.run_commands import list_commands
from mocov3_ds.stability.run_curves import RunCurves, read_curves
from mocov3_ds.stability.run_verdict import RunVerdict, describe_bad_stop, judge_run

PAGE = "report.html"
"""name of the page in the run folder"""
_LIMIT_S = 60.0
_NAMED_ALARMS = 20

_log = logging.getLogger("mocov3_ds")


_PICTURES: tuple[PictureKind[RunCurves], ...] = (
    PictureKind(
        "train/loss_curve", "Loss", "Long curves show the median and the range of each stretch.",
        run_figures.draw_loss,
    ),
    PictureKind(
        "knn/knn_curve", "k-NN accuracy",
        "Probe images classified by the features of recent training images; dots: by a fixed set.",
        run_figures.draw_knn,
    ),
    PictureKind(
        "layers/heat_map", "Which layer, when",
        "Largest gradient of each layer group over its usual one; rows run from the input to the "
        "output, grey is not measured.",
        run_figures.draw_layers,
    ),
    PictureKind("train/rates", "Rates", "What the schedules gave.", run_figures.draw_rates),
    PictureKind(
        "train/gradients", "Gradient and spread",
        "Norm of the whole gradient; how evenly the queries lie on the sphere (0 = collapsed).",
        run_figures.draw_gradients,
    ),
    PictureKind(
        "train/curvature", "Curvature and noise",
        "Of the loss, measured on a copy every so many steps; above a dashed limit steps are "
        "unstable or make the loss rise.",
        run_figures.draw_curvature,
    ),
    PictureKind(
        "train/sequence", "Sequence length", "What compression left of each image.",
        run_figures.draw_sequence,
    ),
    PictureKind(
        "system/speed", "Speed", "Images a second, and what the step loop waited for.",
        run_figures.draw_speed,
    ),
    PictureKind("system/memory", "Memory", "Of the first rank.", run_figures.draw_memory),
)  # fmt: skip


def report(run: Annotated[Path, tyro.conf.Positional], /, *, out: Path | None = None) -> None:
    """Write a page about one run: curves, layers, alarms, settings, the command that repeats it.

    Args:
        run: run folder; the run may still be going on.
        out: HTML file to write; empty = RUN/report.html.
    """
    path = out or run / PAGE
    write_run_page(run, path)
    print(f"{path}: open it in a browser")  # noqa: T201


def write_in_time(run: Path, limit_s: float = _LIMIT_S) -> dict[str, Image.Image]:
    """Write RUN/report.html if that succeeds in time; a run does not fail for its page.

    Args:
        run: run folder, which gets the page.
        limit_s: seconds to wait for the page.

    Returns:
        GROUP/NAME of each picture on it -> the picture; nothing where there is no page.
    """
    pictures: dict[str, Image.Image] = {}
    failures: list[BaseException] = []

    def write() -> None:
        try:
            drawn = write_run_page(run, run / PAGE)
            for name, data in drawn.items():
                pictures[name] = Image.open(io.BytesIO(data)).convert("RGB")
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=write, name="run-page", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        _log.warning("%s takes longer than %.0f s; mocov3 report makes it", run / PAGE, limit_s)
        return {}
    for error in failures:
        _log.warning("%s cannot be written: %s: %s", run / PAGE, type(error).__name__, error)
    return pictures


def write_run_page(run: Path, path: Path) -> dict[str, bytes]:
    """Write the page of a run.

    Args:
        run: run folder, with a log.
        path: HTML file to write; its folder is made.

    Returns:
        GROUP/NAME of each picture on it -> a PNG.

    Raises:
        ValueError: the folder holds no run, or nothing is logged yet.
        OSError: the page cannot be written.
    """
    tree = _read_settings(run)
    curves, rows = read_curves(run)
    pictures = {kind.name: kind.make(curves) for kind in _PICTURES}
    path.parent.mkdir(parents=True, exist_ok=True)
    page = build_run_page(run, tree, curves, rows, list(pictures.values()), judge_run(run))
    atomic.write_text(path, page)
    return {name: picture.data for name, picture in pictures.items() if picture.data is not None}


def _read_settings(run: Path) -> dict[str, Any]:
    """Content of a run's `config.json`.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    path = run / "config.json"
    try:
        tree = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not run.exists():
            raise ValueError(f"{run} does not exist.") from None
        problem = "is no run folder" if run.is_file() else f"holds no run: there is no {path.name}"
        raise ValueError(f"{run} {problem}. {_point_to_logs(run)}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON.") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("config"), dict):
        raise ValueError(f"{path} holds no settings of a run. {_point_to_logs(run)}")
    return tree


def _point_to_logs(run: Path) -> str:
    return (
        "Of the log of another program, a page is made by mocov3 stability report "
        f"{shlex.quote(str(run))}."
    )


def build_run_page(
    run: Path,
    tree: Mapping[str, Any],
    curves: RunCurves,
    rows: Sequence[Row],
    pictures: Sequence[Picture],
    verdict: RunVerdict,
) -> str:
    """The whole page as HTML.

    Args:
        run: run folder, as the page names it.
        tree: content of its `config.json`.
        curves: its log as arrays.
        rows: its log as it is.
        pictures: pictures of it; those without data are left out.
        verdict: what `mocov3 stability report` says of it.
    """
    name = escape(run.resolve().name)
    troubles, commands = _find_troubles(run, tree, rows), list_commands(run, tree)
    plan, ancestors = _read_plan(run), _list_ancestors(tree)
    sections = [
        f"<h1>Run {name}</h1>",
        f'<p class="soft">{escape(_describe(run, tree))}</p>',
        f'<div class="tiles">{"".join(_tiles(tree, curves))}</div>',
        "<h2>Verdict</h2>",
        f"<p>{f'<b>{escape(verdict.word)}</b>: ' * bool(verdict.word)}{escape(verdict.why)}.</p>",
        bullet_list(verdict.notes) * bool(verdict.notes),
        "<h2>What is wrong with it</h2>",
        bullet_list(troubles)
        if troubles
        else "<p>Nothing that a run looks at while it trains.</p>",
        f'<div class="pictures">{"".join(map(embed_picture, pictures))}</div>',
        f"<h2>Early alarms</h2>{_alarm_table(curves)}" * bool(curves.alarms),
        f"<h2>Plan against measured</h2>{bullet_list(plan)}" * bool(plan),
        f"<h2>Where it comes from</h2>{bullet_list(ancestors)}" * bool(ancestors),
        "<h2>Commands</h2>",
        *(
            f'<p class="soft">{escape(purpose)}</p><pre>{escape(line)}</pre>'
            for purpose, line in commands
        ),
        "<h2>Settings</h2>",
        _settings_tables(run, tree),
    ]
    return build_document(f"Run {name}", sections)


def _describe(run: Path, tree: Mapping[str, Any]) -> str:
    status, sentence = describe_status(run, 0.0)
    state = "finished" if status == FINISHED_STATUS else sentence
    version = f", version {tree['version']}" if tree.get("version") else ""
    return f"recipe {tree['config'].get('recipe', '?')}{version}; {state}"


def _find_troubles(run: Path, tree: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """What a run says of itself at its end, and where it stopped if that was a bad step."""
    last = rows[-1]
    epochs, steps = tree["config"].get("epochs"), last["step"]
    is_known = epochs and last.get("epoch")
    review = RunReview(max(1, round(epochs * steps / last["epoch"])) if is_known else steps)
    for row in rows:
        review.push(row)
    return [*review.summarise(), *describe_bad_stop(run, steps)]


def _tiles(tree: Mapping[str, Any], curves: RunCurves) -> Iterator[str]:
    """The most important numbers."""
    config = tree["config"]
    epochs = f"{curves.last('epoch'):.4g} of {config.get('epochs')} epochs"
    yield _tile("steps", f"{int(curves.steps_T[-1]):,}", epochs)
    final = curves.last("knn_full" if len(curves.curve("knn_full")[0]) > 1 else "knn")
    if math.isfinite(final):
        levels = (("start", curves.first("knn_full")), ("chance", curves.first("knn_chance")))
        level_words = [f"{name} {value:.1f} %" for name, value in levels if math.isfinite(value)]
        yield _tile("k-NN accuracy", f"{final:.2f} %", ", ".join(level_words))
    yield _loss_tile(curves)
    speed, wait_s = curves.median("images_per_s"), curves.median("data_wait_s")
    if speed > 0:
        batch = float(config.get("batch") or math.nan)
        share = wait_s * speed / batch  # above 1 where the first batch is waited for before a step
        waiting = f"{100 * share:.1f} % of a step waits for data" if 0 <= share <= 1 else ""
        yield _tile("images/s", f"{speed:,.4g}", waiting)
        seconds = float((batch / curves.curve("images_per_s")[1]).sum())
        yield _tile("time in steps", format_duration(seconds), "k-NN and checkpoints not counted")
    if math.isfinite(curves.last("memory_gib")):
        yield _tile("peak memory", f"{curves.last('memory_gib'):.2f} GiB", "of the first rank")
    dropped = int((curves.curve("applied")[1] == 0).sum())
    stand_ins = f"{curves.total('stand_ins'):.0f} unreadable samples replaced"
    yield _tile("updates dropped", f"{dropped}", stand_ins)


def _loss_tile(curves: RunCurves) -> str:
    """The last loss; where that is not finite, the last one that is stands below."""
    chance = f"chance level {curves.last('chance_loss'):.4g}"
    number = f"{curves.last('loss'):.4g}"
    steps_M, _ = curves.curve("lr")
    finite_M, _ = curves.curve("loss")
    if len(steps_M) and (not len(finite_M) or finite_M[-1] < steps_M[-1]):
        ended = f"{number} at step {finite_M[-1]:,}, " if len(finite_M) else ""
        return _tile("loss", "not finite", f"{ended}{chance}")
    return _tile("loss", number, chance)


def _tile(title: str, number: str, more: str) -> str:
    inner = f"<small>{escape(title)}</small><b>{escape(number)}</b><small>{escape(more)}</small>"
    return f"<div>{inner}</div>"


def format_duration(seconds: float) -> str:
    """Seconds in the unit that suits them; a dash where they are not known."""
    if not math.isfinite(seconds):
        return "-"
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _alarm_table(curves: RunCurves) -> str:
    lines = ["<th>rule</th><th>alarms</th><th class=words>steps</th>"]
    for name, steps in curves.alarms.items():
        named = ", ".join(map(str, steps[:_NAMED_ALARMS].tolist()))
        ending = f", and {len(steps) - _NAMED_ALARMS} more" * (len(steps) > _NAMED_ALARMS)
        lines.append(
            f"<td>{escape(name)}</td><td>{len(steps)}</td><td class=words>{named}{ending}</td>"
        )
    return wrap_table(lines)


def _read_plan(run: Path) -> list[str]:
    """What the run said of its plan, the last time."""
    path = run / PLAN
    text = path.read_text(errors="replace").strip() if path.exists() else ""
    return [text.removeprefix("plan: ")] if text else []


def _list_ancestors(tree: Mapping[str, Any]) -> list[str]:
    """Where the weights came from that the run began with, oldest first; empty = the seed alone."""
    entries = tree.get("ancestry") or []
    return [
        ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in entry.items())
        for entry in entries
        if isinstance(entry, Mapping)
    ]


def _settings_tables(run: Path, tree: Mapping[str, Any]) -> str:
    """Settings that differ from the recipe's, and all of them behind a switch."""
    facts = {name: value for name, value in read_facts(run).items() if not name.startswith("run.")}
    recipe = RECIPES.get(tree["config"].get("recipe", ""))
    if recipe is None:
        return _settings_table(facts)
    default = flatten_facts(Settings(recipe.config, dict(recipe.engine)).as_json())
    changed = {name: value for name, value in facts.items() if default.get(name, "") != value}
    return (
        f'<p class="soft">Those that differ from the recipe {escape(recipe.config.recipe)}.</p>'
        f"{_settings_table(changed)}<details><summary>All {len(facts)} settings</summary>"
        f"{_settings_table(facts)}</details>"
    )


def _settings_table(facts: Mapping[str, Any]) -> str:
    return wrap_table(
        [
            f"<td>{escape(name)}</td><td class=value>{escape(str(value))}</td>"
            for name, value in facts.items()
        ]
    )
