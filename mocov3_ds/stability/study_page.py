"""`mocov3 stability report`: one page about a grid, or about one run, and its numbers as CSV.

OUT/index.html   everything, pictures inside; opens anywhere, loads nothing
OUT/*.png        the pictures
OUT/runs.csv     a row a run        OUT/arms.csv   a row an arm, over its seeds
OUT/events.csv   each gradient event, loss event, dip and decline
OUT/comparisons.csv  a row a comparison of two arms, with its interval and p
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mocov3_ds.data.storage import atomic
from mocov3_ds.monitoring.alarms import RMS_HIGH
from mocov3_ds.stability import advice, comparisons, figures, study_tables
from mocov3_ds.stability.arm_questions import answer_questions
from mocov3_ds.stability.comparable_runs import LinedUp, line_up
from mocov3_ds.stability.csv_file import write_csv
from mocov3_ds.stability.drawing import write_png
from mocov3_ds.stability.page import PageContent, build_page
from mocov3_ds.stability.pictures import Picture, PictureKind
from mocov3_ds.stability.study import Arms, Study, read_study

_PICTURES: tuple[PictureKind[Arms], ...] = (
    PictureKind(
        "knn",
        "k-NN accuracy",
        "Lines are seeds; dips beyond the probes' error are shaded.",
        figures.draw_knn,
    ),
    PictureKind(
        "loss",
        "Loss spikes",
        "Loss above the median of the 30 steps before; dots are jumps of more than 1 %.",
        figures.draw_losses,
    ),
    PictureKind(
        "layers",
        "Which layer, when",
        "Rows run from the input (top) to the output. Of each arm the seed with most events.",
        figures.draw_heat_map,
    ),
    PictureKind(
        "order",
        "First against last layer",
        "Median and quartiles over the gradient events of all seeds, aligned where each begins. "
        "The lead is the median over the events that both layers show.",
        figures.draw_events,
    ),
    PictureKind(
        "rms",
        "RMS of the first trained layer",
        f"Ticks are alarms (rule {figures.ALARM}), shades loss jumps, the dashed line is "
        f"{RMS_HIGH}.",
        figures.draw_rms,
    ),
    PictureKind(
        "rate",
        "Learning rate against accuracy",
        "Solid: patch projection trained; dashed: frozen.",
        figures.draw_rates,
    ),
    PictureKind(
        "trust",
        "Trust ratios",
        "LAMB fails smoothly: look for a ratio that drifts, not for a spike.",
        figures.draw_trust_ratios,
    ),
)


def write_study(source: Path, out: Path, *, command: str = "") -> Path:
    """Write the page, its pictures and its tables.

    Args:
        source: folder of a grid, or a run folder.
        out: folder of the page; it is made if it does not exist.
        command: command that made the runs, printed on the page; empty = as the grid's folder
            tells.

    Returns:
        The page.

    Raises:
        ValueError: `source` is neither a grid nor a run, or nothing is logged yet.
    """
    study = read_study(source)
    if command:
        study = dataclasses.replace(study, command=command)
    drawn_arms = advice.choose_worst_arms(study.arms, figures.PANELS)
    out.mkdir(parents=True, exist_ok=True)
    pictures = [_write_picture(kind, drawn_arms, out) for kind in _PICTURES]
    lined_up = line_up(study.arms)
    compared = comparisons.compare_arms(lined_up.arms)
    runs, arms = _write_tables(study, lined_up, compared, out)
    content = PageContent(
        title=study.title,
        about=study.about,
        scale=study.scale,
        command=study.command,
        arms=arms,
        runs=runs,
        pictures=pictures,
        findings=[
            *comparisons.list_findings(study.arms, compared),
            *answer_questions(lined_up.arms),
        ],
        advice=advice.suggest_next(study.arms),
        notes=[
            *lined_up.notes,
            *comparisons.describe_correction(compared),
            *_list_notes(study, drawn_arms),
        ],
    )
    path = out / "index.html"
    atomic.write_text(path, build_page(content))
    return path


def _write_tables(
    study: Study, lined_up: LinedUp, compared: Sequence[comparisons.Comparison], out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the tables; return the rows of runs and of arms."""
    runs = study_tables.tabulate_runs(study.arms)
    arms = study_tables.tabulate_arms(study.arms, lined_up.arms)
    events = study_tables.tabulate_events(study.arms)
    tables = {
        "runs": runs,
        "arms": arms,
        "events": events or [dict.fromkeys(study_tables.EVENT_COLUMNS)],
        "comparisons": comparisons.tabulate_comparisons(compared),
    }
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", rows)
    return runs, arms


def _write_picture(kind: PictureKind[Arms], arms: Arms, out: Path) -> Picture:
    """Draw a picture and write its file; an earlier file goes where there is nothing to draw."""
    path, picture = out / f"{kind.name}.png", kind.make(arms)
    if picture.data is None:
        path.unlink(missing_ok=True)
    else:
        write_png(path, picture.data)
    return picture


def _list_notes(study: Study, drawn_arms: Arms) -> Iterator[str]:
    """What tables and pictures do not show, and what could not be judged, each once."""
    yield from study.unseen
    if len(drawn_arms) < len(study.arms):
        yield (
            f"The pictures show the {len(drawn_arms)} arms with the most trouble of "
            f"{len(study.arms)}; the tables have all."
        )
    runs = (run for runs in study.arms.values() for run in runs)
    yield from dict.fromkeys(note for run in runs for note in run.judgement.notes)
