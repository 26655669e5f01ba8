"""Networks, images and weights that no run can begin with: one sentence each, no run folder."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from mocov3_ds.distributed import ranks
from mocov3_ds.recipes import parse
from mocov3_ds.training.advance import advance_run
from mocov3_ds.training.build import build_run
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks

SMALL = [
    *("--batch", "8", "--epochs", "1", "--warmup_epochs", "0", "--views.image_size", "32"),
    *("--model.hidden", "16", "--model.out", "8", "--data.threads", "1", "--data.lanes", "2"),
    *("--knn.probes", "0"),
]
VIT = ["--model.dim", "24", "--model.depth", "2", "--model.heads", "2"]
RESNET = ["--model.backbone", "timm:resnet18"]


class Maps(nn.Module):
    """A network without a row of features for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 4, stride=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


CASES = [
    ("an unknown model", ["--model.backbone", "resnet5"], "did you mean resnet50?"),
    ("an unknown model of timm", ["--model.backbone", "timm:resnet5O"], "did you mean resnet50?"),
    ("no such module", ["--model.backbone", "own:no.where:net"], "no.where"),
    ("no features", [*RESNET, "--model.timm", "global_pool="], "of the shape (2, 512, 1, 1)"),
    ("no features of one's own", ["--model.backbone", f"own:{__name__}:Maps"], "(2, 8, 8, 8)"),
    ("rows that know each other", [*RESNET, "--chunk", "4"], "--recompute_blocks"),
    ("the same in a stem", ["--model.backbone", "vit_conv_s16", "--chunk", "4"], "batch norm"),
    ("fewer patches", [*RESNET, "--compress", "2x"], "--compress"),
    ("a part of ViTs", [*RESNET, "--model.layer_scale", "0.1"], "--model.layer_scale 0.1 has no"),
    ("layers of ViTs", [*RESNET, "--model.fp8"], "--model.fp8 True has no effect"),
    (
        "channels without a mean",
        [*RESNET, "--views.channels", "4", "--views.colour_ops", "off"],
        "--views.mean has 3 numbers for --views.channels 4",
    ),
    ("weights that are not there", [*VIT, "--init", "DIR/nowhere.pth"], "DIR/nowhere.pth"),
    ("a text", [*VIT, "--init", "DIR/notes.txt"], "DIR/notes.txt"),
    ("half a file", [*VIT, "--init", "DIR/half.safetensors"], "DIR/half.safetensors"),
    ("a folder of images", [*VIT, "--init", "DIR/set"], "DIR/set"),
    ("tensors of nothing", [*VIT, "--init", "DIR/odd.safetensors"], "DIR/odd.safetensors"),
    ("another network", [*VIT, "--init", "DIR/resnet.safetensors"], "DIR/resnet.safetensors"),
]


def refusals(folder: Path) -> list[str]:
    """What a rank says of each case; empty where it begins."""
    device, said = ranks.start(), []
    for _, flags, _ in CASES:
        flags = [flag.replace("DIR", str(folder)) for flag in flags]
        data = ["--data.shards", str(folder / "set"), "--runs", str(folder / "runs")]
        try:
            build_run(parse([*SMALL, *data, *flags]), device).abandon()
            said.append("")
        except ValueError as error:
            said.append(f"{error}")
    return said


def test_what_a_run_cannot_begin_with_is_one_sentence(tmp_path: Path) -> None:
    make_set(str(tmp_path / "set"), [8])
    (tmp_path / "notes.txt").write_text("no weights\n")
    (tmp_path / "half.safetensors").write_bytes(b"\x80\0\0\0\0\0\0\0{")
    save_file({"a": torch.zeros(2)}, tmp_path / "odd.safetensors")
    save_file({"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "resnet.safetensors")
    [said] = run_ranks(1, refusals, tmp_path)
    problems = []
    for (name, _, words), sentence in zip(CASES, said, strict=True):
        words = words.replace("DIR", str(tmp_path))
        if words not in sentence or "\n" in sentence or not sentence.endswith("."):
            problems.append(f"{name}: {sentence!r}")
    assert not problems, "\n".join(problems)
    assert not (tmp_path / "runs").exists()


def images_of_other_channels(folder: Path) -> str:
    """What the first step of a run on four channels says of photographs."""
    flags = ["--views.channels", "4", "--views.colour_ops", "off"]
    for name in ("mean", "std"):
        flags += [f"--views.{name}", "0.5", "0.5", "0.5", "0.5"]
    data = ["--data.shards", str(folder / "set"), "--runs", str(folder / "runs")]
    run = build_run(
        parse([*SMALL, *VIT, *data, *flags, "--data.max_bad_samples", "2"]), ranks.start()
    )
    try:
        advance_run(run)
    except (ValueError, SystemExit) as error:
        return f"{error}"
    finally:
        run.abandon()
    return ""


def test_images_of_other_channels_end_the_run_by_their_number(tmp_path: Path) -> None:
    make_set(str(tmp_path / "set"), [8])
    [said] = run_ranks(1, images_of_other_channels, tmp_path)
    assert "3 channels (RGB) where 4 are wanted" in said
    assert "\n" not in said
