"""`mocov3 stability report`: one page about a grid, or about one run, and its numbers as CSV.

OUT/index.html   everything, pictures inside; opens anywhere, loads nothing
OUT/*.png        the pictures
OUT/runs.csv     a row a run        OUT/arms.csv   a row an arm, over its seeds
OUT/events.csv   each gradient event, loss event, dip and decline
OUT/comparisons.csv  a row a comparison of two arms, with its interval and p
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mocov3_ds.data.storage import atomic
from mocov3_ds.stability import advice, comparisons, figures, study_tables
from mocov3_ds.stability.arm_questions import answer_questions
from mocov3_ds.stability.comparable_runs import LinedUp, line_up
from mocov3_ds.stability.comparisons import Answer, Comparison
from mocov3_ds.stability.csv_file import write_csv
from mocov3_ds.stability.drawing import write_png
from mocov3_ds.stability.kept_memory import freed_memory_at_hand
from mocov3_ds.stability.ordinary_runs import read_ordinary_runs
from mocov3_ds.stability.page import MARK, PageContent, build_page
from mocov3_ds.stability.pictures import Picture
from mocov3_ds.stability.planned_figure import PLANNED_PICTURE, Answers
from mocov3_ds.stability.study import Arms, Study, read_study
from mocov3_ds.stability.study_pictures import PICTURES, write_pictures

_TABLES = ("runs", "arms", "events", "comparisons")
_MOST_NAMED = 3  # runs before a note that is of some of them
_HEAD = 400  # letters in which a page says what made it


@freed_memory_at_hand()
def write_study(
    sources: Path | Sequence[Path],
    out: Path,
    *,
    command: str = "",
    columns: Sequence[str] = (),
    probes: int = 0,
    page_command: str = "",
) -> Path:
    """Write the page, its pictures and its tables.

    Args:
        sources: folder of one grid; or run folders, logs, and folders of these.
        out: folder of the page; it is made if it does not exist.
        command: command that made the runs; empty = as the grid's folder tells.
        columns: MEANING=COLUMN each, for logs of other programs.
        probes: images that an evaluation classifies, for logs of other programs; 0 = unknown.
        page_command: command that makes this page.

    Returns:
        The page.

    Raises:
        ValueError: there is no run in a source, nothing is logged yet, a log cannot be understood,
            or `out` holds files of somebody else.
    """
    sources = [sources] if isinstance(sources, Path) else list(sources)
    study = read_any_study(sources, columns, probes)
    study = dataclasses.replace(study, command=command or study.command)
    lined_up = line_up(study.arms)
    compared = compare_study(study, lined_up.arms)
    clearest = sorted(compared.comparisons if study.planned else (), key=lambda one: one.p)
    asked = [label for one in clearest for label in (one.reference, one.arm)]
    drawn_arms = advice.choose_worst_arms(study.arms, figures.PANELS, first=asked)
    _check_place(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw_pictures(drawn_arms, compared, out)
    runs, arms = _write_tables(study, lined_up, compared.comparisons, out)
    content = PageContent(
        title=study.title,
        about=study.about,
        scale=study.scale,
        command=study.command,
        page_command=page_command,
        run_commands=study.run_commands,
        arms=arms,
        runs=runs,
        pictures=pictures,
        answers=compared.answers,
        findings=[*compared.sentences, *answer_questions(lined_up.arms)],
        advice=advice.suggest_next(study.arms, elsewhere=_is_elsewhere(study)),
        notes=[
            *lined_up.notes,
            *compared.notes,
            *_list_notes(study, drawn_arms),
        ],
    )
    path = out / "index.html"
    atomic.write_text(path, build_page(content))
    return path


@dataclass(frozen=True)
class Compared:
    """The comparisons of a page.

    Attributes:
        comparisons: all of them.
        notes: how they were corrected.
        sentences: what they say, where the grid plans none.
        by_question: where it does: its questions with their comparisons.
        answers: what these say.
    """

    comparisons: Sequence[Comparison]
    notes: Sequence[str]
    sentences: Sequence[str] = ()
    by_question: Answers = ()
    answers: Sequence[Answer] = ()


def compare_study(study: Study, arms: Arms) -> Compared:
    """Compare the arms of a study: as its grid plans and no others, else all with the first one.

    Args:
        study: what is known of the grid.
        arms: its runs, which got equally far (`comparable_runs.line_up`).
    """
    if study.planned:
        by_question = comparisons.compare_planned(arms, study.planned, study.seeds)
        found = [one for _, of_question in by_question for one in of_question]
        answers = comparisons.list_answers(by_question, study.seeds)
        return Compared(found, [comparisons.PLANNED_NOTE], by_question=by_question, answers=answers)
    found = comparisons.compare_arms(arms)
    sentences = comparisons.list_findings(study.arms, found)
    return Compared(found, comparisons.describe_correction(found), sentences)


def draw_pictures(arms: Arms, compared: Compared, out: Path) -> list[Picture]:
    """Draw the pictures of a page and write their files.

    Args:
        arms: runs that are drawn.
        compared: comparisons of the page; planned ones have a picture.
        out: folder of the files.
    """
    pictures = write_pictures(arms, out)
    if not compared.by_question:
        return pictures
    planned = PLANNED_PICTURE.make(compared.by_question)
    if planned.data is not None:
        write_png(out / f"{PLANNED_PICTURE.name}.png", planned.data)
    return [planned, *pictures]


def _write_tables(
    study: Study, lined_up: LinedUp, compared: Sequence[Comparison], out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the tables; return the rows of runs and of arms."""
    runs = study_tables.tabulate_runs(study.arms)
    arms = study_tables.tabulate_arms(study.arms, lined_up.arms)
    events = study_tables.tabulate_events(study.arms)
    rows = (
        runs,
        arms,
        events or [dict.fromkeys(study_tables.EVENT_COLUMNS)],
        comparisons.tabulate_comparisons(compared),
    )
    for name, table in zip(_TABLES, rows, strict=True):
        write_csv(out / f"{name}.csv", table)
    return runs, arms


def read_any_study(sources: Sequence[Path], columns: Sequence[str], probes: int) -> Study:
    """Read and judge a grid, or runs of any program.

    Args:
        sources: folder of one grid; or run folders, logs, and folders of these.
        columns: MEANING=COLUMN each, for logs of other programs.
        probes: images that an evaluation classifies, for logs of other programs; 0 = unknown.

    Raises:
        ValueError: as `write_study`.
    """
    is_grid = len(sources) == 1 and (sources[0] / "grid.json").exists()
    if is_grid and not columns and not probes:
        return read_study(sources[0])
    return read_ordinary_runs(sources, columns, probes)


def _check_place(out: Path) -> None:
    """Refuse a folder in which a file of somebody else would be overwritten.

    Raises:
        ValueError: it is one.
    """
    page = out / "index.html"
    head = page.read_text(errors="replace")[:_HEAD] if page.exists() else MARK
    if MARK not in head and "<title>Stability: " not in head:  # pages had no mark at first
        raise ValueError(f"{page} is no page of this command; give --out another folder.")
    names = [f"{name}.csv" for name in _TABLES]
    names += [f"{name}.png" for name in (PLANNED_PICTURE.name, *(kind.name for kind in PICTURES))]
    strangers = [name for name in names if (out / name).exists()]
    if strangers and not page.exists():
        raise ValueError(
            f"{out} holds {', '.join(strangers)} without a page beside it, which would be "
            "overwritten; give --out another folder."
        )


def _is_elsewhere(study: Study) -> bool:
    """Whether other programs made all runs: each of these has a sentence of how it was read."""
    return len(study.understood) == sum(map(len, study.arms.values()))


def _list_notes(study: Study, drawn_arms: Arms) -> Iterator[str]:
    """What tables and pictures do not show, and what could not be judged of which runs."""
    yield from study.understood
    yield from study.unseen
    if len(drawn_arms) < len(study.arms):
        yield (
            f"The pictures show {len(drawn_arms)} of {len(study.arms)} arms, those "
            f"{'of the clearest answers' if study.planned else 'with the most trouble'}; the "
            "tables have all."
        )
    runs = [run for runs in study.arms.values() for run in runs]
    named: dict[str, list[str]] = {}
    for run in runs:
        for note in run.judgement.notes:
            named.setdefault(note, []).append(run.cell.name)
    for note, names in named.items():
        if len(names) == len(runs):
            yield note
            continue
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        yield f"{', '.join(names[:_MOST_NAMED])}{more}: {note}"
