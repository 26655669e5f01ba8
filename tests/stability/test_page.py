"""The page as HTML: everything escaped, verdicts coloured, pictures inside."""

from dataclasses import replace
from typing import Any

from mocov3_ds.stability.page import PageContent, build_page
from mocov3_ds.stability.pictures import Picture

NUMBERS = ("I", "E", "R", "T", "jumps", "steps_above", "worst_excess")
NUMBERS += ("knn_best", "knn_final", "knn_full", "loss_final")


def make_row(**values: Any) -> dict[str, Any]:
    row = dict.fromkeys(NUMBERS, 1.0)
    ranges = {f"{name}_{end}": 1.0 for name in NUMBERS for end in ("min", "max")}
    return {**row, **ranges, "paper": None, **values}


CONTENT = PageContent(
    title="A & B",
    about="",
    scale="tiny",
    command="",
    arms=[make_row(arm="<arm>", verdicts="STABLE x1, DIVERGED x1", I_min=0.5, I_max=1.5)],
    runs=[make_row(run="run_seed-0", verdict="STABLE", why="no <event>", steps=480, T=None)],
    pictures=[Picture("Curves", "A caption.", b"png"), Picture("Rates", "Nothing.", None)],
    findings=["a < b"],
    advice=[("STABLE: a", "raise the rate")],
    notes=[],
)


def test_texts_are_escaped_and_verdicts_coloured() -> None:
    html = build_page(CONTENT)
    for text in ("A &amp; B", "&lt;arm&gt;", "no &lt;event&gt;", "a &lt; b"):
        assert text in html
    assert '<span class="v good">STABLE</span> x1' in html
    assert '<span class="v bad">DIVERGED</span> x1' in html
    assert "<dd>raise the rate.</dd>" in html
    unstable = build_page(replace(CONTENT, advice=[("UNSTABLE: a", "clip")]))
    assert '<dt><span class="v bad">UNSTABLE</span>: a</dt>' in unstable
    assert "scale tiny, 1 run, up to 480 steps each." in html


def test_numbers_with_their_range_and_without_a_value() -> None:
    html = build_page(CONTENT)
    assert "<td>1.00<small>0.50 to 1.50</small></td>" in html
    assert "<td>1.0</td>" in html  # a range of one value is not shown
    assert "<td>-</td>" in html


def test_a_picture_without_data_is_named() -> None:
    html = build_page(CONTENT)
    assert 'src="data:image/png;base64,cG5n"' in html
    assert "Nothing to draw for: Rates." in html
    assert html.count("<img ") == 1


def test_sections_that_would_be_empty_are_left_out() -> None:
    html = build_page(CONTENT)
    assert "To keep in mind" not in html and "Commands" not in html
    more = build_page(
        replace(
            CONTENT,
            notes=["one < two"],
            command="mocov3 & co",
            page_command="mocov3 'a b'",
            run_commands=[("<one>", "deepspeed --seed 0")],
        )
    )
    assert "<h2>To keep in mind</h2><ul><li>one &lt; two</li></ul>" in more
    assert "The runs were made by</p><pre>mocov3 &amp; co</pre>" in more
    assert "This page was made by</p><pre>mocov3 &#x27;a b&#x27;</pre>" in more
    assert "&lt;one&gt;</p><pre>deepspeed --seed 0</pre>" in more


def test_half_a_letter_does_no_harm() -> None:
    html = build_page(replace(CONTENT, title="a\ud800b"))
    assert r"a\ud800b" in html
    html.encode()


def test_the_papers_column_stands_where_it_has_a_value() -> None:
    assert "paper, linear probe" not in build_page(CONTENT)
    rows = [make_row(arm="a", verdicts="STABLE x1", paper=72.2)]
    html = build_page(replace(CONTENT, arms=rows))
    assert "<th>paper, linear probe</th>" in html and "<td>72.2</td>" in html
