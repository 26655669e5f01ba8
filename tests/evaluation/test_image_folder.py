"""A folder of images: its order, its classes, and what in it is none."""

from pathlib import Path

import pytest
import torch

from mocov3_ds.evaluation.image_folder import ImageFolder
from tests.evaluation.runs import coloured


def write(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(coloured(number))


def test_order_and_classes(tmp_path: Path) -> None:
    write(tmp_path, "b/2.png", "a/deep/1.PNG", "b/1.jpeg", ".hidden/3.png", "__MACOSX/4.png")
    for name in ("a/notes.txt", "a/._1.png"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    folder = ImageFolder(tmp_path)
    assert folder.paths == ["a/deep/1.PNG", "b/1.jpeg", "b/2.png"]
    assert (folder.classes, folder.labels_N.tolist()) == (["a", "b"], [0, 1, 1])
    assert folder.left_out == 2
    write(tmp_path, "top.png")
    mixed = ImageFolder(tmp_path)
    assert (mixed.classes, set(mixed.labels_N.tolist())) == ([], {-1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/x.csv").write_text("")
    with pytest.raises(ValueError, match=r"neither shards .* nor images \(1 other files\)"):
        ImageFolder(tmp_path / "empty")


@pytest.mark.parametrize("threads", [0, 2])
def test_ranks_share_the_images(tmp_path: Path, threads: int) -> None:
    write(tmp_path, *(f"{i:02}.png" for i in range(11)))

    def read(rank: int, world_size: int, spare: int = 0) -> dict[int, torch.Tensor]:
        batches = ImageFolder(tmp_path).read_batches(
            image_size=8, batch=3, rank=rank, world_size=world_size, threads=threads,
            max_unreadable=spare)  # fmt: skip
        return {int(i): x for crops, _, ids in batches for i, x in zip(ids, crops, strict=True)}

    alone, shares = read(0, 1), [read(rank, 3) for rank in range(3)]
    assert [*alone] == [*range(11)]
    assert sum(map(len, shares)) == 11
    for share in shares:
        assert all(torch.equal(x, alone[i]) for i, x in share.items())
    (tmp_path / "03.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"1 unreadable images, .*max_unreadable 0; .* '03\.png'"):
        read(0, 1)
    assert {*read(0, 1, spare=1)} == {*range(11)} - {3}
