"""A run that begins with given weights: each layout's numbers arrive in both encoders, by name."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mocov3_ds import train
from mocov3_ds.checkpoints.checkpoint import Checkpoint
from mocov3_ds.data.storage.atomic import digest_file
from mocov3_ds.model.vit import sincos_positions
from mocov3_ds.recipes import parse
from mocov3_ds.training.build import build_run
from mocov3_ds.training.init_weights import InitWeights, read_init
from mocov3_ds.training.run_model import build_model
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks
from tests.test_train import SMALL, rows_of

Tensors = dict[str, Tensor]
LAST = "checkpoints/step-00000002"


def below(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new + n.removeprefix(old): t for n, t in tensors.items() if n.startswith(old)}


def published(base: Tensors, momentum: Tensors) -> Tensors:
    """A whole run in the names of the published files."""
    names: Tensors = {}
    for encoder, tensors in (("base_encoder", base), ("momentum_encoder", momentum)):
        names |= below(tensors, "backbone.", f"module.{encoder}.")
        names |= below(tensors, "projector.", f"module.{encoder}.head.")
    return names | below(base, "predictor.", "module.predictor.")


def write_layouts(folder: Path, files: Mapping[str, Tensors]) -> dict[str, str]:
    """The same two encoders in files of four programs."""
    base, momentum = files["base"], files["momentum"]
    student = below(base, "backbone.", "")
    torch.save({"state_dict": published(base, momentum)}, folder / "published.pth.tar")
    save_file(student | {"head.weight": torch.ones(5, 24)}, folder / "timm.safetensors")
    dino = {
        "student": below(student, "", "module.backbone."),
        "teacher": below(momentum, "backbone.", "backbone."),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }
    torch.save(dino, folder / "dino.pth")
    torch.save({"model": student}, folder / "deit.pth")
    names = ("published.pth.tar", "timm.safetensors", "dino.pth", "deit.pth")
    return {name: str(folder / name) for name in names}


def expected_tensors(name: str, which: str, files: Mapping[str, Tensors]) -> Tensors:
    """What a run takes from a file, by the names of its base encoder."""
    expected = {n: t for n, t in files[which].items() if n.startswith("backbone.")}
    if name in ("run", "last", "published.pth.tar"):
        expected |= {n: t for n, t in files[which].items() if n.startswith("projector.")}
        expected |= {n: t for n, t in files["base"].items() if n.startswith("predictor.")}
    return expected


def begin(flags: list[str], name: str) -> dict[str, Any]:
    """What a run holds before its first step."""
    run = build_run(parse([*flags, "--name", name]), torch.device("cpu"))
    base = {n: t.detach().clone() for n, t in run.base.state_dict().items()}
    momentum = {n: t.clone() for n, t in run.momentum_encoder.full_state()}
    step, line, ancestry = run.step, run.start.line, run.start.ancestry
    run.close()
    return {"base": base, "momentum": momentum, "step": step, "line": line, "ancestry": ancestry}


def begin_with_each(folder: str, flags: list[str]) -> dict[str, Any]:
    os.chdir(folder)
    train.train(parse([*flags, "--name", "first", "--stop_after_steps", "2"]))
    saved = Checkpoint(Path("runs/first", LAST))
    files = {group: saved.read_group(group) for group in ("base", "momentum")}
    layouts = write_layouts(Path(folder), files)
    layouts |= {"run": "runs/first", "last": str(saved.folder)}
    flags = [*flags, "--seed", "7"]
    random = build_model(parse(flags).config, 1).base.state_dict()
    found: dict[str, Any] = {"files": files, "random": random}
    for name, which in CASES:
        given = [*flags, "--init", layouts[name], "--init_which", which]
        found[f"{name} {which}"] = begin(given, f"{Path(name).stem}-{which}")
    begun = [*flags, "--init", layouts["dino.pth"], "--init_which", "momentum", "--name", "begun"]
    train.train(parse([*begun, "--stop_after_steps", "2"]))
    (Path(folder) / "dino.pth").unlink()
    train.train(parse([*begun, "--stop_after_steps", "3"]))  # resume wins: the file is gone
    return found


CASES = [("last", "momentum"), ("published.pth.tar", "base"), ("timm.safetensors", "base")]


@pytest.mark.slow
def test_a_run_begins_with_the_numbers_of_each_layout(tmp_path: Path) -> None:
    make_set(str(tmp_path / "train"), [20, 7, 23])
    flags = [*SMALL, "--data.shards", str(tmp_path / "train"), "--knn.probes", "0"]
    found = run_ranks(1, begin_with_each, str(tmp_path), flags)[0]
    random, files = found.pop("random"), found.pop("files")
    assert len(found) == len(CASES)
    for case, begun in found.items():
        expected = expected_tensors(*case.split(), files)
        for tensor, value in begun["base"].items():
            wanted = expected.get(tensor, random[tensor])
            assert torch.equal(value, wanted), (case, tensor)
        for tensor, value in begun["momentum"].items():
            assert torch.equal(value, begun["base"][tensor]), (case, tensor)
        (entry,) = begun["ancestry"]
        assert entry["tensors"] == len(expected), case
        assert begun["step"] == 0
    run = tmp_path / "runs/begun"
    config = json.loads((run / "config.json").read_text())
    state = json.loads((run / "checkpoints/step-00000003/state.json").read_text())
    assert config["ancestry"] == state["ancestry"]
    assert config["ancestry"][0]["path"] == str(tmp_path / "dino.pth")
    assert [row["step"] for row in rows_of(run)] == [1, 2, 3]


SHAPE = SMALL[SMALL.index("--views.image_size") : SMALL.index("--data.threads")]


def init(path: Path, *flags: str) -> InitWeights:
    config = parse([*SHAPE, "--init", str(path), *flags]).config
    return read_init(config, build_model(config, 1).base)


def base_tensors(*flags: str) -> Tensors:
    return dict(build_model(parse([*SHAPE, *flags]).config, 1).base.state_dict())


def backbone(image_size: int = 16) -> Tensors:
    return below(base_tensors("--views.image_size", str(image_size)), "backbone.", "")


def test_each_layout_is_read_by_name(tmp_path: Path) -> None:
    files = {"base": base_tensors("--seed", "3"), "momentum": base_tensors("--seed", "4")}
    files["momentum"] = {n: t for n, t in files["momentum"].items() if "predictor" not in n}
    layouts = write_layouts(tmp_path, files)
    for name, path in layouts.items():
        for which in ("base", "momentum") if name.startswith(("pub", "dino")) else ("base",):
            read = init(Path(path), "--init_which", which)
            expected = expected_tensors(name, which, files)
            assert {*read.tensors} == {*expected}
            for tensor, value in expected.items():
                assert torch.equal(read.tensors[tensor], value), (name, which, tensor)
            numbers = sum(tensor.numel() for tensor in expected.values())
            assert f"{len(expected)} tensors with {numbers:,} numbers" in read.line
            assert "patch projection comes from there and stays as it is" in read.line
            is_random = "the projector stays random" in read.line
            assert is_random == (name != "published.pth.tar"), read.line
            assert read.record["digest"] == digest_file(Path(path))
    line = init(Path(layouts["published.pth.tar"])).line
    assert "not taken: state_dict.module.momentum_encoder (46)" in line
    assert "not taken: head (1)" in init(Path(layouts["timm.safetensors"])).line


def test_positions_are_resized_and_colours_summed(tmp_path: Path) -> None:
    save_file(backbone(32), tmp_path / "large.safetensors")
    read = init(tmp_path / "large.safetensors")
    assert "positions resized from 4 x 4 to 2 x 2 patches" in read.line
    assert torch.equal(read.tensors["backbone.pos_embed"], sincos_positions((2, 2), 24))
    assert read.record["digest"] == digest_file(tmp_path / "large.safetensors")
    grey = ("--views.channels", "1", "--views.colour_ops", "off", "--views.mean", "0.5")
    read = init(tmp_path / "large.safetensors", *grey, "--views.std", "0.25")
    summed = backbone(32)["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.equal(read.tensors["backbone.patch_embed.proj.weight"], summed)
    assert "summed over the three colours" in read.line


def test_ordinary_weights_begin_the_same_function_with_gains_and_factors(tmp_path: Path) -> None:
    save_file(backbone(), tmp_path / "plain.safetensors")
    plain = build_model(parse(SHAPE).config, 1).base.backbone
    plain.load_state_dict(backbone())
    x_BCHW = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for flags in (["--model.sigma_reparam"], ["--model.layer_scale", "1"]):
        read = init(tmp_path / "plain.safetensors", "--seed", "5", *flags)
        other = build_model(parse([*SHAPE, "--seed", "5", *flags]).config, 1).base
        other.load_state_dict(dict(other.state_dict()) | dict(read.tensors))
        # gain / sigma is 1 up to the last digit of fp32
        torch.testing.assert_close(other.backbone(x_BCHW), plain(x_BCHW), rtol=1e-5, atol=1e-6)
    line = init(tmp_path / "plain.safetensors", "--model.sigma_reparam").line
    assert "gains of sigma_reparam begin as the weights' largest singular values" in line
    gain = init(tmp_path / "plain.safetensors", "--model.sigma_reparam").tensors
    weight = gain["backbone.blocks.1.mlp.fc1.weight"]
    sigma = float(torch.linalg.matrix_norm(weight, 2))
    assert float(gain["backbone.blocks.1.mlp.fc1.gain"]) == pytest.approx(sigma, rel=0.02)


def test_what_cannot_be_a_start_is_one_sentence(tmp_path: Path) -> None:
    whole = backbone()
    save_file(whole, tmp_path / "good.safetensors")
    save_file({n: t for n, t in whole.items() if n != "norm.bias"}, tmp_path / "less.safetensors")
    save_file(whole | {"blocks.0.ls1.gamma": torch.ones(24)}, tmp_path / "more.safetensors")
    scaled = below(base_tensors("--model.layer_scale", "0.1"), "backbone.", "")
    save_file(scaled, tmp_path / "scaled.safetensors")
    torch.save({"model": whole, "num_heads": 6}, tmp_path / "heads.pth")
    (tmp_path / "folder").mkdir()
    cases = [
        ("none.pth", (), "there is no"),
        ("folder", (), "it is no run"),
        ("less.safetensors", (), "1 weights of a 2-block Vision Transformer are missing"),
        ("less.safetensors", (), "norm.bias"),
        ("more.safetensors", (), "blocks.0.ls1.gamma (LayerScale)"),
        ("heads.pth", (), "has heads 6, the run heads 2; give --model.heads 6"),
        ("good.safetensors", ("--model.dim", "48"), "give --model.dim 24"),
        ("good.safetensors", ("--model.positions", "none"), "give --model.positions sincos"),
        ("good.safetensors", ("--init_which", "momentum"), "take it by --init_which base"),
        ("good.safetensors", ("--model.layer_scale", "0.1"), "give --model.layer_scale 1, or 0"),
        ("scaled.safetensors", (), "has LayerScale; give --model.layer_scale 1"),
    ]
    for name, flags, words in cases:
        with pytest.raises(ValueError) as refused:
            init(tmp_path / name, *flags)
        assert words in str(refused.value), (name, str(refused.value))


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "test_vit"])
def test_networks_of_timm_begin_with_files_of_timm(tmp_path: Path, model: str) -> None:
    made = timm.create_model(model, pretrained=False)
    state = {n: t.contiguous() for n, t in made.state_dict().items()}
    save_file(state, tmp_path / "timm.safetensors")
    flags = ["--model.backbone", f"timm:{model}", "--views.image_size", "160"]
    config = parse([*flags, "--model.hidden", "32", "--init", str(tmp_path / "timm.safetensors")])
    base = build_model(config.config, 1).base
    read = read_init(config.config, base)
    own = {n for n in base.state_dict() if n.startswith("backbone.")}
    assert {*read.tensors} == own
    for name in own:
        assert torch.equal(read.tensors[name], state[name.removeprefix("backbone.")]), name
    classifier = "fc" if model == "test_resnet" else "head"
    assert f"{classifier} (" in read.line.split("not taken: ")[1]
    with pytest.raises(ValueError, match="--init"):
        init(tmp_path / "timm.safetensors")
