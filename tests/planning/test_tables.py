"""The tables over many plans."""

from mocov3_ds.planning.command import plan_run
from mocov3_ds.planning.tables import tabulate_fits, tabulate_recipes
from mocov3_ds.recipes import RECIPES


def test_what_fits() -> None:
    runs = [plan_run(name, batch=4096) for name in ("vit_b16", "vit_l16", "vit_h14")]
    rows = tabulate_fits(runs).splitlines()
    assert len(rows) == 2 + 3 * 4
    assert all(row.count("ZeRO-") == 3 for row in rows[2:])


def test_recipes() -> None:
    rows = tabulate_recipes(plan_run).splitlines()[2:]
    papers = {name: recipe.paper for name, recipe in RECIPES.items() if name.startswith("vit_")}
    assert len(rows) == len(papers)
    for row, (name, paper) in zip(rows, papers.items(), strict=True):
        assert row.startswith(f"| {name}, ") and f"--recipe {name} " in row
        assert row.endswith(f"| {paper} |")
        hours = [cell.partition(" (")[0] for cell in row.split(" | ")[2].split(", ")]
        assert len(hours) == 3
        # a machine of eight H100 is the fastest of the three
        assert min(float(hour) for hour in hours if hour != "-") == float(hours[2])
        assert " to " in row.split(" | ")[2]
