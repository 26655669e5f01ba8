"""What was published, and what the planner's rules count of it."""

import math

import pytest

from mocov3_ds.planning import architecture, public_figures
from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.public_figures import FIGURES, Pass, fit_elementwise, fit_products


def test_a_pass_is_what_the_planner_counts_of_a_block() -> None:
    shape = plan_run("vit_l16").shape
    tokens = architecture.count_tokens(shape)
    once = Pass(public_figures.LARGE, tokens, backwards=0).work()
    block = architecture.block_work(shape) * shape.vit.depth
    assert (once.linear, once.attention) == (block.linear, block.attention)
    both = Pass(public_figures.LARGE, tokens).work()
    assert both.linear == 3 * once.linear
    assert both.attention == (1 + architecture.ATTENTION_BACKWARD) * once.attention
    assert Pass(public_figures.LARGE, tokens, count=2, forwards=2).work().moved == pytest.approx(
        2 * (both.moved + once.moved)
    )


def test_a_fit_returns_the_share_that_made_the_figures() -> None:
    made = [figure for figure in FIGURES if figure.group == "A100, training"]
    made = [
        public_figures.Figure(
            figure.name, figure.card, figure.predict(0.47, 0.3), "", "", figure.passes
        )
        for figure in made
    ]
    assert fit_products(made, 0.3) == pytest.approx(0.47)
    assert fit_elementwise(made, [0.2, 0.25, 0.3, 0.35]) == 0.3
    assert made[0].reach_of_products(1e-6) == math.inf


def test_every_figure_has_a_source_and_a_preset() -> None:
    for figure in FIGURES:
        assert figure.source and figure.card in public_figures.PRESETS
        assert all(share > 0 for share in figure.seconds()[:2])
    for group in {figure.group for figure in FIGURES}:
        assert any(not figure.kept_out for figure in FIGURES if figure.group == group)
