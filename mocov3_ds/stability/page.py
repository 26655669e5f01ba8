"""How does a study look as HTML? One file, which loads nothing else; any width, light or dark."""

import base64
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mocov3_ds.settings.wording import count_noun
from mocov3_ds.stability.comparisons import Answer
from mocov3_ds.stability.pictures import Picture

_LEGEND = {
    "k-NN full": "accuracy after the last step with a bank of that network's own features, %",
    "I": "share of accuracy-time lost to dips, %",
    "E": "gradient events per 1000 steps",
    "R": "share of steps with RMS of the patch projection above 2.3",
    "T": "final accuracy of the frozen twin minus this, points",
    "jumps": "rises of the loss more than 1 % above the median of the 30 steps before",
    "steps above": "steps that far above",
    "worst excess": "the largest such excess, %",
}
_COLUMNS = {
    "knn_final": ("k-NN final", "{:.1f}"),
    "knn_full": ("k-NN full", "{:.1f}"),
    "loss_final": ("final loss", "{:.3f}"),
    "I": ("I", "{:.2f}"),
    "E": ("E", "{:.1f}"),
    "R": ("R", "{:.3f}"),
    "T": ("T", "{:+.1f}"),
    "jumps": ("jumps", "{:.1f}"),
    "steps_above": ("steps above", "{:.1f}"),
    "worst_excess": ("worst excess", "{:.1f}"),
    "knn_best": ("k-NN best", "{:.1f}"),
}

_STYLE = """
:root { --ink:#1b1f24; --soft:#57606a; --paper:#f6f7f9; --card:#ffffff; --line:#d9dde2;
  --bad:#b3261e; --warn:#8a5a00; --good:#1a7f4b; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e8eaed; --soft:#a2abb5; --paper:#0b0d0f; --card:#121212; --line:#30363d;
    --bad:#ff8a80; --warn:#f0b849; --good:#5dd39e; }
  .picture img { filter: invert(.93) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin:0; background:var(--paper); color:var(--ink);
  font:16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width:1120px; margin:0 auto; padding:20px 14px 60px; }
h1 { font-size:1.5rem; line-height:1.25; margin:.2em 0; }
h2 { font-size:1.1rem; margin:1.8em 0 .5em; } h3 { font-size:1rem; margin:1em 0 0; }
p, li { max-width:70ch; } p { margin:.4em 0; } .soft { color:var(--soft); font-size:.9rem; }
code { font:.85em ui-monospace, Menlo, Consolas, monospace; overflow-wrap:anywhere; }
.pictures { columns:2 440px; column-gap:14px; }
.picture { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:12px;
  margin:0 0 14px; break-inside:avoid; }
.picture h3 { font-size:1rem; margin:0; } .picture img { width:100%; height:auto; display:block; }
.scroll { overflow-x:auto; background:var(--card); border:1px solid var(--line);
  border-radius:8px; }
table { border-collapse:collapse; width:100%; font-size:.86rem; font-variant-numeric:tabular-nums; }
th, td { padding:6px 8px; text-align:right; vertical-align:top; white-space:nowrap;
  border-bottom:1px solid var(--line); }
th:first-child, td:first-child { text-align:left; white-space:normal; min-width:9em;
  position:sticky; left:0; background:var(--card); }
td.words, th.words { text-align:left; white-space:normal; min-width:11em; }
tr:last-child td { border-bottom:0; }
@media (max-width: 600px) { th, td { padding:5px 6px; } td.words, th.words { min-width:7em; }
  th:first-child, td:first-child { min-width:6em; max-width:8.5em; overflow-wrap:anywhere; }
  ul { padding-left:1.2em; } }
td small { display:block; color:var(--soft); font-size:.92em; }
.v { font-weight:600; } .bad { color:var(--bad); } .warn { color:var(--warn); }
.good { color:var(--good); }
.tiles { display:grid; gap:10px; grid-template-columns:repeat(auto-fill, minmax(150px,1fr)); }
.tiles div { background:var(--card); border:1px solid var(--line); border-radius:8px;
  padding:8px 12px; } .tiles b { display:block; font-size:1.25rem; line-height:1.3; }
.tiles small { display:block; color:var(--soft); }
pre { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:10px 12px;
  margin:.5em 0; white-space:pre-wrap; overflow-wrap:anywhere;
  font:.85em/1.45 ui-monospace, Menlo, Consolas, monospace; }
td.value { text-align:left; white-space:pre-wrap; overflow-wrap:anywhere; min-width:9em; }
details summary { cursor:pointer; margin:1em 0 .4em; } dl { margin:.4em 0; }
dt { font-weight:600; margin-top:.6em; } dd { margin:0; max-width:70ch; }
"""
MARK = '<meta name="generator" content="mocov3">'
"""what stands in the head of each page"""
_TONE = {
    "DIVERGED": "bad",
    "NOT LEARNING": "bad",
    "RESTARTED": "bad",
    "DEGRADING": "bad",
    "UNSTABLE": "bad",
    "BELOW ITS TWIN": "warn",
    "TWITCHY": "warn",
    "NOT LOOKED": "warn",
    "STABLE": "good",
}
_VERDICTS = re.compile("|".join(rf"\b{verdict}\b" for verdict in _TONE))


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """Everything that stands on the page."""

    title: str
    """title of the study"""
    about: str
    """what the study asks"""
    scale: str
    """scale of the grid; empty for a single run"""
    command: str
    """command that made the runs; empty = not known"""
    arms: Sequence[Mapping[str, Any]]
    """rows of `study_tables.tabulate_arms`"""
    runs: Sequence[Mapping[str, Any]]
    """rows of `study_tables.tabulate_runs`"""
    pictures: Sequence[Picture]
    """those without data are named in a sentence"""
    findings: Sequence[str]
    """sentences about each arm against the first, and about all runs together"""
    advice: Sequence[tuple[str, str]]
    """which arms, and what to try next"""
    notes: Sequence[str]
    """what tables and pictures do not show, sentences"""
    answers: Sequence[Answer] = ()
    """what the grid asked before its runs"""
    page_command: str = ""
    """command that made the page; empty = not known"""
    run_commands: Sequence[tuple[str, str]] = ()
    """name of a run, and the command that trains it again"""


def build_page(content: PageContent) -> str:
    """The whole page as HTML."""
    missing = ", ".join(picture.title for picture in content.pictures if picture.data is None)
    about = escape(content.about)
    facts, title = _describe_runs(content.scale, content.runs), escape(content.title)
    sections = [
        f"<h1>Stability: {title}</h1>",
        f"<p>{about}</p>" * bool(about),
        f'<p class="soft">{facts}</p>',
        *_build_answers(content.answers),
        "<h2>Verdicts</h2>",
        _build_arm_table(content.arms),
        f'<p class="soft">Means over seeds; below them least to largest. {_format_legend()}</p>',
        f"<h2>What was found</h2>{bullet_list(content.findings)}" * bool(content.findings),
        "<h2>Pictures</h2>",
        f'<div class="pictures">{"".join(map(embed_picture, content.pictures))}</div>',
        f'<p class="soft">Nothing to draw for: {escape(missing)}.</p>' * bool(missing),
        f"<h2>What to try next</h2>{_definition_list(content.advice)}",
        f"<details><summary>Every run</summary>{_build_run_table(content.runs)}</details>",
        f"<h2>To keep in mind</h2>{bullet_list(content.notes)}" * bool(content.notes),
        *_build_commands(content),
    ]
    return build_document(f"Stability: {title}", sections)


def _build_answers(answers: Sequence[Answer]) -> Iterator[str]:
    """What was asked before the runs: each question with its answer, the details folded away."""
    if answers:
        yield "<h2>What was asked</h2>"
    for one in answers:
        yield f"<h3>{escape(one.question)}</h3><p>{escape(one.summary)}</p>"
        if one.details:
            details = bullet_list(one.details)
            yield f"<details><summary>{escape(one.basis)}</summary>{details}</details>"


def _build_commands(content: PageContent) -> Iterator[str]:
    """The commands that made the runs and the page, as HTML."""
    commands = [("The runs", content.command), ("This page", content.page_command)]
    given_commands = [(title, line) for title, line in commands if line]
    if not given_commands and not content.run_commands:
        return
    yield "<h2>Commands</h2>"
    for title, line in given_commands:
        yield f'<p class="soft">{title} were made by</p>'.replace("page were", "page was")
        yield f"<pre>{escape(line)}</pre>"
    if content.run_commands:
        lines = (
            f'<p class="soft">{escape(name)}</p><pre>{escape(line)}</pre>'
            for name, line in content.run_commands
        )
        yield f"<details><summary>Each run again</summary>{''.join(lines)}</details>"


def build_document(title: str, sections: Sequence[str]) -> str:
    """A whole HTML file.

    Args:
        title: title of the window, as HTML.
        sections: what stands on the page, as HTML.
    """
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{MARK}<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
    return page.encode("utf-8", "backslashreplace").decode()  # a name may hold half a letter


def bullet_list(sentences: Sequence[str]) -> str:
    """A list of sentences as HTML."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in sentences)}</ul>"


def _definition_list(pairs: Sequence[tuple[str, str]]) -> str:
    entries = (f"<dt>{_colour_verdicts(a)}</dt><dd>{escape(b)}.</dd>" for a, b in pairs)
    return f"<dl>{''.join(entries)}</dl>"


def _describe_runs(scale: str, runs: Sequence[Mapping[str, Any]]) -> str:
    steps = max(run["steps"] for run in runs)
    prefix = f"scale {escape(scale)}, " if scale else ""
    return f"{prefix}{count_noun(len(runs), 'run')}, up to {steps} steps each."


def _format_legend() -> str:
    entries = (f"<b>{escape(name)}</b> {escape(text)}" for name, text in _LEGEND.items())
    return "; ".join(entries) + "."


def _build_arm_table(arms: Sequence[Mapping[str, Any]]) -> str:
    paper = any(row["paper"] is not None for row in arms)
    heads = [name for name, _ in _COLUMNS.values()] + ["paper, linear probe"] * paper
    lines = [f"<th>arm</th><th class=words>verdict</th>{_join_cells('th', heads)}"]
    for row in arms:
        values = [_mean_and_range(row, key, form) for key, (_, form) in _COLUMNS.items()]
        values += [_format_number(row["paper"], "{:.1f}")] * paper
        lines.append(
            f"<td>{escape(row['arm'])}</td><td class=words>{_colour_verdicts(row['verdicts'])}</td>"
            f"{_join_cells('td', values)}"
        )
    return wrap_table(lines)


def _build_run_table(runs: Sequence[Mapping[str, Any]]) -> str:
    heads = [name for name, _ in _COLUMNS.values()]
    lines = [f"<th>run</th><th class=words>verdict</th>{_join_cells('th', heads)}"]
    for row in runs:
        values = [_format_number(row[key], form) for key, (_, form) in _COLUMNS.items()]
        lines.append(
            f"<td>{escape(row['run'])}</td><td class=words>{_colour_verdicts(row['verdict'])}"
            f"<small>{escape(row['why'])}</small></td>{_join_cells('td', values)}"
        )
    return wrap_table(lines)


def wrap_table(lines: Sequence[str]) -> str:
    """A table as HTML, which scrolls where it is too wide.

    Args:
        lines: cells of each line as HTML.
    """
    return (
        f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
    )


def _join_cells(tag: str, values: Sequence[str]) -> str:
    return "".join(f"<{tag}>{value}</{tag}>" for value in values)


def _mean_and_range(row: Mapping[str, Any], key: str, form: str) -> str:
    """Mean, and below it the range over seeds."""
    mean = _format_number(row[key], form)
    low, high = (_format_number(row[f"{key}_{end}"], form) for end in ("min", "max"))
    return mean if low == high else f"{mean}<small>{low} to {high}</small>"


def _format_number(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def _colour_verdicts(text: str) -> str:
    """Text with its verdicts coloured."""
    return _VERDICTS.sub(
        lambda match: f'<span class="v {_TONE[match[0]]}">{match[0]}</span>', escape(text)
    )


def embed_picture(picture: Picture) -> str:
    """A picture with title and caption as HTML; empty where there is nothing to draw."""
    if picture.data is None:
        return ""
    data = base64.b64encode(picture.data).decode()
    return (
        f'<figure class="picture"><h3>{escape(picture.title)}</h3>'
        f'<p class="soft">{escape(picture.caption)}</p>'
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}"></figure>'
    )
