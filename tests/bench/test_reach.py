"""The bench of published speeds: how near kept-out figures come, and whose shares presets use."""

import pytest

from mocov3_ds.bench import reach as bench
from mocov3_ds.planning import reach
from mocov3_ds.planning.public_figures import FIGURES, fit_products


def test_most_of_the_figures_that_no_fit_saw_are_near(capsys: pytest.CaptureFixture[str]) -> None:
    bench.run_bench(bench.ReachOptions())
    printed = capsys.readouterr().out
    assert "training and inference of one program: 16 of 18 within 20%" in printed
    assert "CLIP on hundreds of cards: 4 of 7 within 20%" in printed
    assert printed.count("| no |") == 25 and printed.count("| yes |") == len(FIGURES) - 25


@pytest.mark.parametrize(
    ("group", "preset"),
    [
        ("RTX 3090, training", reach.GA102),
        ("A100, training", reach.A100),
        ("H100, training", reach.HOPPER),
        ("V100, whole recipes of 2021", reach.VOLTA),
    ],
)
def test_presets_have_the_fitted_shares(group: str, preset: reach.Reach) -> None:
    figures = [figure for figure in FIGURES if figure.group == group]
    assert fit_products(figures, preset.elementwise) == pytest.approx(preset.products, abs=0.006)


def test_ada_is_ampere_by_both_cards_inference() -> None:
    shares = {}
    for card in ("RTX3090", "RTX4090"):
        figures = [figure for figure in FIGURES if figure.group == f"{card}, inference"]
        shares[card] = fit_products(figures, bench.choose_elementwise(figures))
    ratio = shares["RTX4090"] / shares["RTX3090"]
    assert ratio * reach.GA102.products == pytest.approx(reach.AD102.products, abs=0.01)


def test_the_range_holds_what_was_published() -> None:
    """All but one kept-out figure: launches bound an eager network of width 384 on an H100."""
    spread = reach.FITTED
    outside = [ratio for ratio in bench.choose_kept(False) if not 1 / spread <= ratio <= spread]
    assert len(outside) == 1 and outside[0] > 2.5
