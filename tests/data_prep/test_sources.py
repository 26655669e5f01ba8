"""Every form of the same images gives the same list; odd sources are refused in one sentence."""

import gc
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from torchvision.datasets import ImageFolder

from data_prep.source_options import SourceOptions
from data_prep.sources import list_images
from tests.data_prep import forms
from tests.data_prep.making import describe_listing

IMAGES = forms.imagenet(4)


@pytest.fixture
def tree(tmp_path):
    return forms.write_tree(tmp_path / "tree", IMAGES)


def test_a_tree_is_listed_like_image_folder(tree):
    (tree / "n01440764" / "notes.txt").write_text("x")
    (tree / "n01440764" / ".hidden.jpg").write_bytes(b"x")
    listing = list_images(str(tree))
    rows, classes, _ = describe_listing(listing)
    assert classes == forms.CLASSES
    assert rows == [
        (name, name.partition("/")[2].partition(".")[0], forms.CLASSES.index(name[:9]), data)
        for name, data in sorted(IMAGES.items())
    ]
    left_out = {reason: entry.example for reason, entry in listing.balance.left_out.items()}
    assert left_out == {
        "ends in .txt, so no image by its name": "n01440764/notes.txt",
        "hidden (or a system's own)": "n01440764/.hidden.jpg",
    }
    assert listing.balance.as_json(0)["seen"] == len(rows) + 2


def test_a_tree_a_tar_and_a_nested_tar_are_the_same_source(tree, tmp_path):
    wanted = describe_listing(list_images(str(tree)))
    flat = forms.write_tar(tmp_path / "flat.tar", dict(reversed(IMAGES.items())))
    assert describe_listing(list_images(str(flat))) == wanted
    nested = forms.write_tar(tmp_path / "ILSVRC2012_img_train.tar", forms.nested(IMAGES))
    assert describe_listing(list_images(str(nested))) == wanted
    below = {f"train/{name}": data for name, data in IMAGES.items()}
    below |= {f"val/{name}": data for name, data in forms.imagenet(2).items()}
    splits = forms.write_tar(tmp_path / "splits.tar", below)
    assert describe_listing(list_images(str(splits), under="train")) == wanted
    forms.write_tree(tmp_path / "splits", below)
    assert describe_listing(list_images(str(tmp_path / "splits"), under="train/")) == wanted


def test_an_emptied_class_folder_is_refused_kept_or_dropped(tree, tmp_path):
    """As ImageFolder refuses it, or with its `allow_empty`."""
    (tree / "n01440764" / "emptied below").mkdir()  # no class folder
    (tree / "n01500000").mkdir()
    with pytest.raises(ValueError, match=r"has 1 class folders without images \(n01500000\)"):
        list_images(str(tree))
    kept = list_images(str(tree), options=SourceOptions(empty_classes="keep"))
    folder = ImageFolder(str(tree), allow_empty=True)
    assert [*kept.classes] == folder.classes and folder.classes[2] == "n01500000"
    assert sorted(kept.label_N.tolist()) == sorted(folder.targets)
    dropped = list_images(str(tree), options=SourceOptions(empty_classes="drop"))
    assert dropped.classes == forms.CLASSES
    for name, message in (
        ("a.jxl", "1 class folders without images"),
        (".DS_Store", "1 class fold"),
    ):
        tar = forms.write_tar(tmp_path / "t.tar", {**IMAGES, f"n01500000/{name}": b"x"})
        with pytest.raises(ValueError, match=message):
            list_images(str(tar))
    tar = forms.write_tar(tmp_path / "t.tar", {**IMAGES, "annotations/a.xml": b"x"})
    assert list_images(str(tar)).classes == forms.CLASSES


def test_a_class_that_is_a_link_has_images_of_its_own(tmp_path):
    forms.write_tree(tmp_path / "real", {"1.jpg": forms.picture(1), "2.jpg": forms.picture(2)})
    tree = forms.write_tree(tmp_path / "tree", {"ant/1.jpg": forms.picture(3)})
    for name in ("dog", "canine"):
        (tree / name).symlink_to(tmp_path / "real")
    listing = list_images(str(tree))
    folder = ImageFolder(str(tree))
    assert [*listing.classes] == folder.classes
    found = [(item.path, item.label) for item in listing.select_items(np.arange(len(listing)))]
    assert found == folder.samples
    assert any("1 folders are links to one that is listed as well" in n for n in listing.notes)


def test_linked_folders_are_followed_and_loops_are_left_out(tree, tmp_path):
    other = tmp_path / "linked"
    other.mkdir()
    for name in forms.CLASSES:
        (other / name).symlink_to(tree / name)
    (other / "again").symlink_to(other)
    assert (
        describe_listing(list_images(str(other)))[0] == describe_listing(list_images(str(tree)))[0]
    )


def test_bad_sources_are_refused_in_one_sentence(tree, tmp_path):
    def refused(source, match, **options):
        with pytest.raises(ValueError, match=match) as error:
            list_images(str(source), **options)
        assert str(error.value).endswith(".") and "\n" not in str(error.value)

    refused(tmp_path / "nowhere", "there is no .*nowhere")
    refused("s3://bucket/images", "sources are files of this machine")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images")
    refused(tree, "there is no folder val in", under="val")
    refused(tree, r"--under \.\./x leaves", under="../x")
    flat = forms.write_tar(tmp_path / "flat.tar", IMAGES)
    refused(flat, r"\(below val\) holds no images", under="val")
    (tree / "stray.jpg").write_bytes(forms.picture(0))
    refused(tree, "1 of 13 images of .* have no class, e.g. stray.jpg; put every image in a class")
    splits = {
        f"{split}/{name}": data for split in ("train", "val") for name, data in IMAGES.items()
    }
    refused(
        forms.write_tree(tmp_path / "splits", splits),
        r"holds splits \(train, val\), not classes; .*--under train --split train",
    )
    dangling = forms.write_tree(tmp_path / "dangling", {"a/x.jpg": b"1"})
    (dangling / "a" / "y.jpg").symlink_to("nothing")
    refused(dangling, "y.jpg is a link to nothing")
    cut = tmp_path / "cut.tar"
    cut.write_bytes(flat.read_bytes()[:1536])
    refused(cut, "cut.tar is cut short at byte 1536")
    hostile = forms.write_tar(tmp_path / "hostile.tar", {"../x.jpg": b"1"})
    refused(hostile, "leaves the archive's own folder")
    inner = forms.nested(IMAGES)
    inner["n01443537.tar"] = inner["n01443537.tar"][:3000]
    damaged = forms.write_tar(tmp_path / "inner.tar", inner)
    refused(damaged, "n01443537.tar in .*inner.tar.* (cut short|past the end)")
    text = tmp_path / "text.tar"
    text.write_text("hello" * 200)
    refused(text, "no tar header|checksum")


def test_levels_of_the_path_are_asked_about_not_guessed(tmp_path):
    def tar(name, *paths):
        members = {path: forms.picture(n) for n, path in enumerate(paths)}
        return str(forms.write_tar(tmp_path / name, members))

    def classes(source, **options):
        listing = list_images(source, options=SourceOptions(**options))
        return [listing.classes[n] if n >= 0 else None for n in listing.label_N]

    wrapped = tar("w.tar", "flowers/cat/0.jpg", "flowers/dog/1.jpg")
    with pytest.raises(
        ValueError, match=r"--class-level 2 makes 2 classes \(cat, dog\), as does --u"
    ):
        list_images(wrapped)
    assert classes(wrapped, class_level="1") == ["flowers"] * 2
    assert (
        classes(wrapped, class_level="2") == classes(wrapped, class_level="own") == ["cat", "dog"]
    )
    assert classes(wrapped, class_level="none") == [None, None]
    assert list_images(wrapped, under="flowers").classes == ("cat", "dog")
    # the names of a class file and synsets speak for one level
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    assert list_images(wrapped, classes=tmp_path / "names.txt").classes == ("dog", "cat")
    assert classes(tar("s.tar", "d/n00000001/0.jpg", "d/n00000002/1.jpg"))[1] == "n00000002"
    tar("parts/0.tar", "part0/cat/0.jpg", "part0/dog/1.jpg")
    tar("parts/1.tar", "part1/cat/2.jpg", "part1/fox/3.jpg")
    with pytest.raises(ValueError, match=r"--class-level 1 makes 2 .*--class-level 2 makes 3 "):
        list_images(str(tmp_path / "parts"))
    assert classes(str(tmp_path / "parts"), class_level="2") == ["cat", "dog", "cat", "fox"]
    domains = tar("p.tar", "photo/cat/0.jpg", "photo/dog/0.jpg", "sketch/cat/0.jpg")
    assert classes(domains, class_level="1") == ["photo", "photo", "sketch"]
    with pytest.raises(ValueError, match="may be one or another folder"):
        list_images(domains)
    with pytest.raises(ValueError, match="--class-level 'first' is not one of"):
        list_images(domains, options=SourceOptions(class_level="first"))
    # one class below others, of some images alone: as ImageFolder has it
    assert classes(tar("i.tar", "cat/0.jpg", "cat/old/1.jpg", "dog/2.jpg")) == ["cat", "cat", "dog"]


def test_archives_of_single_classes_are_asked_about(tmp_path):
    for name in ("cat", "dog"):
        forms.write_tar(tmp_path / "s" / f"{name}.tar", {"1.jpg": forms.picture(len(name))})
    with pytest.raises(
        ValueError, match=r"different names \(cat, dog\): add --class-level archive"
    ):
        list_images(str(tmp_path / "s"))
    named = list_images(str(tmp_path / "s"), options=SourceOptions(class_level="archive"))
    assert named.classes == ("cat", "dog") and named.label_N.tolist() == [0, 1]


def test_splits_are_never_joined_unasked(tmp_path):
    images = {f"{split}/cat/{split}.jpg": forms.picture(len(split)) for split in ("train", "val")}
    for number in range(2):
        forms.write_tar(tmp_path / "inside" / f"{number}.tar", images)
    with pytest.raises(
        ValueError, match=r"holds splits \(train, val\).*--under train --split train"
    ):
        list_images(str(tmp_path / "inside"))
    with pytest.raises(ValueError, match=r"holds splits \(train, val\)"):
        list_images(str(tmp_path / "inside"), label="-")
    all_images = list_images(
        str(tmp_path / "inside"), label="-", options=SourceOptions(class_level="2")
    )
    assert len(all_images) == 4 and all_images.classes == ("cat",)
    listing = list_images(str(tmp_path / "inside"), under="train")
    assert listing.names == ["0/cat/train.jpg", "1/cat/train.jpg"] and listing.classes == ("cat",)
    for name in ("im-train-00", "im-train-01", "im-validation-00"):
        forms.write_tar(tmp_path / "names" / f"{name}.tar", {"a.jpg": forms.picture(1)})
    with pytest.raises(ValueError, match=r"--files 'im-train-\*\.tar' or 'im-validation-\*\.tar'"):
        list_images(str(tmp_path / "names"))
    chosen = SourceOptions(files="im-train-*.tar", class_level="none")
    assert len(list_images(str(tmp_path / "names"), options=chosen)) == 2
    tree = forms.write_tree(
        tmp_path / "mvtec",
        {
            f"{top}/{split}/{top}{split}.jpg": forms.picture(1)
            for top in ("bottle", "cable")
            for split in ("train", "test")
        },
    )
    with pytest.raises(ValueError, match=r"--files '\*/test/\*' --split test"):
        list_images(str(tree))
    part = list_images(str(tree), options=SourceOptions(files="*/train/*"))
    assert part.names == ["bottle/train/bottletrain.jpg", "cable/train/cabletrain.jpg"]
    assert part.classes == ("bottle", "cable") and part.balance.omitted == 2


def test_hidden_things_are_left_out_of_every_form(tree, tmp_path):
    wanted = describe_listing(list_images(str(tree)))
    hidden = {
        ".ipynb_checkpoints/x.jpg": forms.picture(1),
        "n01440764/.ipynb_checkpoints/1-checkpoint.JPEG": forms.picture(2),
        "__MACOSX/n01440764/._1.JPEG": b"x",
        "n01443537/Thumbs.db": b"x",
    }
    tar = forms.write_tar(tmp_path / "t.tar", IMAGES | hidden)
    assert describe_listing(list_images(str(tar))) == wanted
    assert list_images(str(tar)).balance.omitted == len(hidden)
    forms.write_tree(tree, hidden)
    assert describe_listing(list_images(str(tree))) == wanted


def test_a_stray_label_file_does_not_decide_how_a_tar_is_read(tree, tmp_path):
    wanted = describe_listing(list_images(str(tree)))
    for stray in ({"class_to_idx.json": b"{}"}, {"meta/x.cls": b"1", "notes.json": b"{}"}):
        listing = list_images(str(forms.write_tar(tmp_path / "t.tar", IMAGES | stray)))
        assert describe_listing(listing) == wanted and listing.balance.omitted == len(stray)


def test_a_tar_of_webdataset_tars_keeps_its_labels(tmp_path):
    def shard(first):
        members = {}
        for number in (first, first + 1):
            members |= {f"{number}.jpg": forms.picture(number), f"{number}.cls": b"%d" % number}
        return forms.tar_bytes(members)

    tar = forms.write_tar(tmp_path / "set.tar", {"s-0.tar": shard(0), "s-1.tar": shard(2)})
    listing = list_images(str(tar))
    deeper = {"all.tar": forms.tar_bytes({"cat.tar": shard(0), "dog.tar": shard(2)})}
    deeper_tar = str(forms.write_tar(tmp_path / "deeper.tar", deeper))
    of_folders = SourceOptions(class_level="1")
    assert list_images(deeper_tar, options=of_folders).classes == ("cat", "dog")
    rows, classes, _ = describe_listing(listing)
    assert [(name, label, data) for name, _, label, data in rows] == [
        (f"s-{number // 2}/{number}.jpg", number, forms.picture(number)) for number in range(4)
    ]
    assert classes == () and listing.balance.as_json(0)["side_files"] == 4


def test_what_lies_behind_the_end_mark_is_told(tmp_path):
    whole = forms.tar_bytes(IMAGES)
    path = tmp_path / "t.tar"
    path.write_bytes(whole + bytes(10240) + forms.tar_bytes({"lost.jpg": forms.picture(1)}))
    listing = list_images(str(path))
    assert listing.balance.left_out["bytes behind the end mark of a tar"].count == 1
    path.write_bytes(whole + bytes(10240))
    assert not list_images(str(path)).balance.left_out


def test_folders_of_a_tar_are_class_folders_too(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        folder = tarfile.TarInfo("./n01500000/")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in IMAGES.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "t.tar").write_bytes(out.getvalue())
    with pytest.raises(ValueError, match=r"class folders without images \(n01500000\)"):
        list_images(str(tmp_path / "t.tar"))


def test_a_file_url_is_a_path(tree):
    assert describe_listing(list_images(f"file://{tree}")) == describe_listing(
        list_images(str(tree))
    )


@pytest.mark.filterwarnings(
    "ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_what_other_writers_make_has_the_labels_that_their_readers_give(tmp_path):
    """Sets of webdataset's ShardWriter, and the layout of img2dataset beside its own files."""
    wanted = {}
    with webdataset.ShardWriter(f"{tmp_path}/w-%03d.tar", maxcount=3, verbose=0) as writer:
        for number in range(7):
            key = f"part.v1/{number:05d}"
            writer.write({"__key__": key, "jpg": forms.picture(number), "cls": 10 * number})
            wanted[forms.picture(number)] = 10 * number
    urls = f"{tmp_path}/w-{{000..002}}.tar"
    pairs = webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg", "cls")
    assert {image: int(label) for image, label in pairs} == wanted
    gc.collect()  # webdataset leaves its files open; here is where that may be said
    rows, _, _ = describe_listing(list_images(urls))
    assert {data: label for _, _, label, data in rows} == wanted
    members = {}
    for number in range(2):
        key = f"{number:09d}"
        members |= {f"{key}.jpg": forms.picture(number), f"{key}.txt": b"a caption"}
        members |= {f"{key}.json": b'{"caption": "a caption", "key": "%s"}' % key.encode()}
    forms.write_tar(tmp_path / "i" / "00000.tar", members)
    (tmp_path / "i" / "00000_stats.json").write_text("{}")
    (tmp_path / "i" / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"00000.parquet is not a parquet file"):
        list_images(str(tmp_path / "i"))
    listing = list_images(str(tmp_path / "i"), options=SourceOptions(files="*.tar"))
    assert listing.label_N.tolist() == [-1, -1] and listing.balance.as_json(0)["side_files"] == 2


def test_the_validation_tar_gets_the_classes_of_the_training_set(tmp_path):
    """ILSVRC2012_img_val.tar with the kit's numbers, and the folders that people sort it into."""
    classes = ["n02102040", "n01440764", "n01443537"]  # by ILSVRC2012_ID
    truth = [2, 1, 3, 3]
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
    images = {name: forms.picture(number) for number, name in enumerate(names)}
    tar = forms.write_tar(tmp_path / "ILSVRC2012_img_val.tar", images)
    (tmp_path / "truth.txt").write_text("".join(f"{number}\n" for number in truth))
    (tmp_path / "classes.txt").write_text("\n".join(classes) + "\n")
    sorted_out = {
        f"{classes[number - 1]}/{name}": images[name]
        for number, name in zip(truth, names, strict=True)
    }
    folder = ImageFolder(str(forms.write_tree(tmp_path / "val", sorted_out)))
    listing = list_images(str(tar), labels=tmp_path / "truth.txt", classes=tmp_path / "classes.txt")
    wanted = {Path(path).name: label for path, label in folder.samples}
    assert dict(zip(listing.names, listing.label_N.tolist(), strict=True)) == wanted
    assert [*listing.classes] == folder.classes
