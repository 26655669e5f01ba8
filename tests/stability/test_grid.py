"""Grids: what a file lays out, what train.py gets, and one sentence for each mistake."""

from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.stability import grid as grids
from mocov3_ds.stability.grid import lay_out, load_grid, tomllib

SMALL = """
title = "Two rates"
seeds = 2
[base]
batch = 64
lr = 1e-3
[axes]
lr = [1e-3, 2e-3]
[scale.cifar.axes]
lr = [5e-3]
[scale.imagenet]
twins = false
"""
ARMS = """
twins = ["plain"]
[base]
epochs = 3
[[arms]]
name = "plain"
[[arms]]
name = "short memory"
beta2 = 0.95
[[arms]]
name = "LAMB"
optimizer = "Lamb"
axes = { lr = [1e-3, 4e-3] }
"""


def laid_out(text: str, scale: str = "tiny", seeds: int | None = None) -> grids.Grid:
    return lay_out(tomllib.loads(text), "mine", scale, seeds)


def test_axes_seeds_and_twins_make_the_cells() -> None:
    grid = laid_out(SMALL)
    assert grid.title == "Two rates"
    names = [cell.name for cell in grid.cells]
    assert names == [
        f"lr-{lr}{frozen}_seed-{seed}"
        for seed in (0, 1)
        for lr in ("0.001", "0.002")
        for frozen in ("", "_frozen")
    ]
    by_name = {cell.name: cell for cell in grid.cells}
    for cell in grid.cells:
        assert cell.settings["batch"] == 64
        assert f"lr {cell.settings['lr']:g}" in cell.label
        if cell.frozen:
            assert not cell.twin
        else:
            twin = by_name[cell.twin]
            assert twin.frozen
            assert {**cell.settings, "patch": ""} == {**twin.settings, "patch": ""}
    assert [cell.name for cell in laid_out(SMALL, "imagenet", 1).cells] == [
        "lr-0.001_seed-0",
        "lr-0.002_seed-0",
    ]
    assert {cell.settings["lr"] for cell in laid_out(SMALL, "cifar").cells} == {5e-3}


def test_arms_are_alternatives() -> None:
    cells = laid_out(ARMS, seeds=1).cells
    assert [cell.label for cell in cells] == [
        "plain",
        "plain, frozen",
        "short memory",
        "LAMB, lr 0.001",
        "LAMB, lr 0.004",
    ]
    assert cells[0].twin == cells[1].name
    assert not any(cell.twin for cell in cells[1:])


def test_every_axis_is_in_the_names_of_an_arms_cells() -> None:
    text = 'twins = false\n[axes]\nbeta2 = [0.9, 0.95]\n"model.depth" = [4, 8]\n'
    text += '[[arms]]\nname = "plain"\n[[arms]]\nname = "stable"\nupdate_clip = true\n'
    cells = laid_out(text + "axes = { warmup = [0.1, 0.2] }", seeds=1).cells
    assert len(cells) == 4 + 8
    assert cells[0].label == "plain, beta2 0.9, model.depth 4"
    assert cells[-1].name == "stable_beta2-0.95_model.depth-8_warmup-0.2_seed-0"


def test_cells_of_one_name_must_be_one_run() -> None:
    slugs = '[[arms]]\nname = "LAMB"\nlr = 1e-3\n[[arms]]\nname = "lamb"\nlr = 1e-3\nbeta2 = 0.9'
    words = r"mine: 'LAMB, lr 0.001' \(beta2 None\) and 'lamb, lr 0.001' \(beta2 0.9\) would both"
    with pytest.raises(ValueError, match=words):
        laid_out(slugs)
    with pytest.raises(
        ValueError, match=r"lr 0.001\) and 'lr 0.001' \(lr 0.001000001\) would both"
    ):
        laid_out("[axes]\nlr = [1e-3, 1.000001e-3]")
    # what the arm's name says is said once
    said = (
        "twins = ['a']\n[[arms]]\nname = 'frozen + b'\npatch = 0\n[[arms]]\nname = 'a'\npatch = 0.2"
    )
    labels = [cell.label for cell in laid_out(said, seeds=1).cells]
    assert labels == ["frozen + b", "a, patch rate 0.2", "a, frozen"]
    # a twin and the axis' own frozen value are one
    assert len(laid_out("[axes]\npatch = ['trained', 0]", seeds=1).cells) == 2


@pytest.mark.parametrize("name", grids.list_grids())
def test_ready_grids(name: str) -> None:
    for scale in grids.SCALES:
        grid = load_grid(name, scale, 1)
        if (name, scale) != ("paper-batch", "tiny"):  # Fig. 1 has none
            assert any(cell.frozen for cell in grid.cells)
            assert any(cell.twin for cell in grid.cells)
        assert len({cell.label for cell in grid.cells}) == len(grid.cells)
        assert grid.about


def test_the_papers_values_at_its_own_scale() -> None:
    def of(name: str, *keys: str) -> list[tuple[Any, ...]]:
        cells = load_grid(name, "imagenet", 1).cells
        return [tuple(cell.settings.get(key) for key in keys) for cell in cells if not cell.frozen]

    assert of("paper-batch", "batch", "lr", "epochs", "warmup_epochs") == [
        (batch, 1e-4, 100, 40) for batch in (1024, 2048, 4096, 6144)
    ]
    assert of("paper-lr", "lr", "batch") == [(lr, 4096) for lr in (0.5e-4, 1e-4, 1.5e-4)]
    lamb = [row for row in of("paper-optimizer", "optimizer", "lr", "weight_decay") if row[0]]
    assert {("Lamb", 5e-4, 1e-3), ("Lamb", 6e-4, 1e-3), ("Lamb", 8e-4, 1e-3)} <= {*lamb}
    assert len(load_grid("paper-optimizer", "imagenet").cells) % 3 == 0


WRONG = [
    ("[base]\nbacth = 3", "[base] has an unknown setting 'bacth' (did you mean batch?)"),
    ("[base]\ndepth = 3", "[base] has an unknown setting 'depth' (did you mean model.depth?)"),
    ("[axes]\nbeta3 = [1]", "[axes] has an unknown setting 'beta3' (did you mean beta2?)"),
    ("[axes]\nlr = 1e-3", "[axes] has lr = 0.001; an axis is a list"),
    ("[axes]\nlr = []", "the grid has no cells"),
    ("[axis]\nlr = [1e-3]", "the file has an unknown key 'axis' (did you mean axes?)"),
    ("axes = 3", "axes is 3, not a table"),
    ("[base]\nseed = 3", "[base] sets 'seed'; --seeds says how many"),
    ('[base]\npatch = "half"', "[base] has patch = 'half'; it is 'trained', 'frozen' or a rate"),
    ('[base]\nrecipe = "vit_b"', "recipe = 'vit_b' (did you mean vit_b16?)"),
    ("[scale.tyny]\nseeds = 3", "[scale] has an unknown key 'tyny' (did you mean tiny?)"),
    ("[scale.tiny]\naxis = 3", "[scale.tiny] has an unknown key 'axis' (did you mean axes?)"),
    ("[[arms]]\nlr = 1e-3", "arm 1 has no name"),
    ('[arms]\nname = "a"', "write [[arms]] above each"),
    ('[[arms]]\nname = "a"\nbtch = 3', "arm 'a' has an unknown setting 'btch' (did you mean batch"),
    ('[[arms]]\nname = "a"\n[[arms]]\nname = "a"', "two arms have one name"),
    ('twins = ["b"]\n[[arms]]\nname = "a"', "twins has an unknown key 'b'"),
    ("[scale.tiny.change.a]\nlr = 1", "[scale.tiny.change] has an unknown key 'a'"),
    (
        '[[arms]]\nname = "a"\n[scale.tiny.change.a]\nbtch = 3',
        "[scale.tiny.change], arm 'a', has an unknown setting 'btch'",
    ),
    ('[[arms]]\nname = "a"\n[scale.tiny.change]\na = 3', "a is 3, not a table"),
    ("seeds = 0", "seeds is 0; it must be a number of 1 or more"),
    ("seeds = true", "seeds is True; it must be a number of 1 or more"),
    ("twins = 3", "twins is 3; it is true, false or names of arms"),
    ("twins = [3]", "twins is [3]; it is true, false or names of arms"),
    ("title = 3", "title is 3, not a text"),
    ("about = 3", "about is 3, not a text"),
    ("effect = -1", "effect is -1; it must be a number of points, 0 or more"),
    ("[base]\npatch = [0]", "[base] has patch = [0]; it is 'trained', 'frozen' or a rate"),
    ("[base]\npatch = true", "[base] has patch = True; it is"),
    ("[axes]\npatch = [0.2, 2]", "[axes] has patch = 2; it is"),
    (
        "[base]\noptimizer = 3",
        "[base] has optimizer = 3; it is one of AdamW, Adam (as AdamW), Lamb,",
    ),
    ('[base]\nrecipe = ["tiny"]', "[base] has recipe = ['tiny'] (did you mean tiny?)"),
    ("[base]\nepochs = 'x'\nwarmup = 0.1", "[base] has epochs = 'x'; it must be a number"),
    ("[base]\nwarmup = 'x'", "[base] has warmup = 'x'; it must be a number"),
    ("[base]\ngradient_clipping = 'x'", "[base] has gradient_clipping = 'x'; it must be a number"),
    ("[axes]\ngradient_clipping = [1, -1]", "[axes] has gradient_clipping = -1; it must be a"),
    # what only train.py can tell, with the cell's name
    ("[base]\nepochs = 1", "cell as-it-is_seed-0: --warmup_epochs"),
    ("[base]\nbatch = 'x'", "cell as-it-is_seed-0:"),
    ('[base]\noptimizer = "SGDM"', "cell as-it-is_seed-0: optimizer type 'SGDM' is unknown"),
    ('[base]\noptimizer = "Lars"\nbeta2 = 0.9', "optimizer Lars has no parameter 'betas'"),
    ("title = ", "is not valid TOML"),
]


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_one_sentence_names_the_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine") as raised:
        load_grid(str(path), "tiny")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_arm_of_the_file_has_other_settings_at_a_scale() -> None:
    text = ARMS + "weight_decay = 0.5\n[scale.tiny.change]\nLAMB = { weight_decay = 0.25 }\n"
    decays = {
        scale: {cell.settings.get("weight_decay") for cell in laid_out(text, scale, 1).cells}
        for scale in ("tiny", "cifar")
    }
    assert decays == {"tiny": {None, 0.25}, "cifar": {None, 0.5}}


def test_a_scale_goes_on_about_the_grid_and_wants_another_effect() -> None:
    text = 'about = "What it asks."\neffect = 2\n[scale.tiny]\nabout = "In small."\neffect = 5.5\n'
    tiny, cifar = laid_out(text), laid_out(text, "cifar")
    assert (tiny.about, tiny.effect) == ("What it asks. In small.", 5.5)
    assert (cifar.about, cifar.effect) == ("What it asks.", 2)
    assert (laid_out(ARMS).effect, laid_out(ARMS).spread) == (0, 0)
    assert laid_out("spread = 1.5").spread == 1.5


def test_no_such_grid(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no grid 'paper-btach' \(did you mean paper-batch\?\)"):
        load_grid("paper-btach", "tiny")
    with pytest.raises(ValueError, match="there is no grid file"):
        load_grid(str(tmp_path / "none.toml"), "tiny")
    with pytest.raises(ValueError, match=r"no scale 'huge'"):
        laid_out(SMALL, "huge")
