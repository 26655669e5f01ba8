"""Published speeds of Vision Transformers beside what the planner's rules say of them.

    python -m mocov3_ds.bench reach

A group of figures has one reach, fitted to those of its figures that are not kept out; the last
lines say how near the kept-out ones come, and what the presets of `mocov3 plan --list` rest on.
Nothing is run: this is arithmetic over published numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mocov3_ds.planning.public_figures import FIGURES, Figure, fit_elementwise, fit_products
from mocov3_ds.planning.reach import COMPILED, EAGER

_NEAR = 0.2
_SHARES = [percent / 100 for percent in range(10, 100)]


@dataclass(frozen=True, kw_only=True)
class ReachOptions:
    """Published speeds of Vision Transformers, predicted by the planner's rules."""


def run_bench(options: ReachOptions) -> None:
    """Print every figure with its prediction, then the shares that were fitted."""
    groups: dict[str, list[Figure]] = {}
    for figure in FIGURES:
        groups.setdefault(figure.group, []).append(figure)
    lines, fits = [], []
    for group, figures in groups.items():
        elementwise = choose_elementwise(figures)
        products = fit_products(figures, elementwise)
        fits.append(f"* {group}: products {products:.2f}, element-wise kernels {elementwise:.2f}")
        for figure in figures:
            predicted = figure.predict(products, elementwise)
            lines.append(
                f"| {group} | {figure.name} | {'no' if figure.kept_out else 'yes'} "
                f"| {figure.published:g} | {predicted:.4g} | {predicted / figure.published:.2f} "
                f"| {figure.source} |"
            )
    print("| group | network | fitted | published, images/s a card | predicted | ratio | source |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    print("\nFitted:\n")
    print("\n".join(fits))
    print()
    for title, ratios in (
        ("Kept out, training and inference of one program", choose_kept(whole_recipes=False)),
        ("Kept out, whole recipes of 2021 and CLIP on hundreds of cards", choose_kept(True)),
    ):
        near = sum(abs(ratio - 1) <= _NEAR + 5e-3 for ratio in ratios)  # as the table rounds
        print(f"{title}: {near} of {len(ratios)} within {_NEAR:.0%}.")


def choose_elementwise(figures: Sequence[Figure]) -> float:
    """Share of the bandwidth for a group: its own where the group can tell, else the common one."""
    if figures[0].compiled:
        return COMPILED
    if figures[0].card == "RTX4090":  # its cache holds what other cards' memory does
        return fit_elementwise(figures, _SHARES)
    return EAGER


def choose_kept(whole_recipes: bool) -> list[float]:
    """Predicted over published, of the figures that no fit has seen.

    Args:
        whole_recipes: those of whole recipes, loaders and clusters included, or all others.
    """
    ratios = []
    for figure in FIGURES:
        is_whole = "recipes" in figure.group or "CLIP" in figure.group
        if figure.kept_out and is_whole == whole_recipes:
            group = [member for member in FIGURES if member.group == figure.group]
            elementwise = choose_elementwise(group)
            products = fit_products(group, elementwise)
            ratios.append(figure.predict(products, elementwise) / figure.published)
    return ratios
