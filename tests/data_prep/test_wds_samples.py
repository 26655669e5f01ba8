"""Members become samples as webdataset groups them; what is no sample is counted and told."""

import itertools

import pytest
from webdataset.tariterators import group_by_keys

from data_prep.balance import Balance
from data_prep.index import index_tars
from data_prep.sources import list_images
from data_prep.tar import Member
from data_prep.wds_samples import NO_PICK, Choices, MemberPick, TarSample, group_samples, read_label
from tests.data_prep import forms


def members(*names):
    return [Member(name, number, 1) for number, name in enumerate(names)]


def group(*names, pick=NO_PICK):
    balance, choices = Balance(), Choices()
    samples = [*group_samples(members(*names), pick, balance=balance, choices=choices)]
    balance.see(len(names))
    balance.images += len(samples)
    balance.as_json(0)  # closes
    return samples, balance, choices


def named(sample):
    parts = (sample.image, sample.cls, sample.json)
    return [sample.key, *(member.name if member else None for member in parts)]


def test_samples_are_runs_of_members_with_one_key():
    names = ["a.jpg", "a.cls", "b.cls", "a.png", "c.mask.png", "c.png", ".hidden", "x.txt"]
    samples = list(group_samples([Member(name, n, 1) for n, name in enumerate(names)]))
    assert [(sample.key, sample.image.name) for sample in samples] == [
        ("a", "a.jpg"),
        ("a", "a.png"),
        ("c", "c.png"),
    ]
    assert samples[0].cls.name == "a.cls" and samples[1].cls is None


def test_groups_are_those_of_webdataset():
    """Wherever a group has one image with a plain ending, key and members are the same."""
    names = []
    folders, stems = ("", "x/", "x.y/z/"), ("a", "b")
    for folder, stem in itertools.product(folders, stems):
        names += [f"{folder}{stem}.{end}" for end in ("JPG", "cls", "json", "seg.png", "txt")]
    names += ["README", "x/c.txt", "x/d.cls", "e.jpg"]
    stream = ({"fname": name, "data": name, "__url__": "t"} for name in names)
    wanted = [
        (sample["__key__"], sample["jpg"], sample.get("cls"), sample.get("json"))
        for sample in group_by_keys(stream)
        if "jpg" in sample
    ]
    assert [tuple(named(sample)) for sample in group(*names)[0]] == wanted and len(wanted) == 7


def test_names_with_words_before_their_endings():
    samples, balance, _ = group("k0.image.jpg", "k0.label.cls", "k1.image.jpg", "k1.label.cls")
    assert [named(sample) for sample in samples] == [
        ["k0.image", "k0.image.jpg", "k0.label.cls", None],
        ["k1.image", "k1.image.jpg", "k1.label.cls", None],
    ]
    assert not balance.left_out and balance.side_files == 2
    (sample,), _, _ = group("a.jpg", "a.meta.json", "a.target.cls")
    assert named(sample) == ["a", "a.jpg", "a.target.cls", "a.meta.json"]


def test_a_dotted_key_that_another_sample_swallows_is_told():
    samples, balance, _ = group("1.jpg", "1.cls", "1.5.jpg", "1.5.cls", "2.jpg", "2.cls")
    assert [sample.key for sample in samples] == ["1", "2"]
    assert {reason: entry.example for reason, entry in balance.left_out.items()} == {
        "further image of a sample": "1.5.jpg",
        "label file that is not used": "1.5.cls",
    }


def test_several_images_or_labels_of_a_sample_are_asked_about(tmp_path):
    pairs = ["a.left.png", "a.right.png", "a.cls", "b.left.png", "b.right.png", "b.cls"]
    with pytest.raises(
        ValueError, match=r"2 samples of S hold several images: left.png, right.png"
    ):
        group(*pairs)[2].check("S")
    for pick in ("left", "left.png", "LEFT.PNG"):
        samples, balance, choices = group(*pairs, pick=MemberPick(pick, ""))
        choices.check("S")
        assert [named(sample)[:3] for sample in samples] == [
            ["a", "a.left.png", "a.cls"],
            ["b", "b.left.png", "b.cls"],
        ]
        assert balance.left_out["further image of a sample"].count == 2
    group("v.0001.png", "v.0002.png", "w.0001.png", "w.0002.png")[2].check("S")  # frames
    labels = ["a.jpg", "a.coarse.cls", "a.fine.cls"]
    with pytest.raises(
        ValueError, match=r"1 samples of S hold several labels: coarse.cls, fine.cls"
    ):
        group(*labels)[2].check("S")
    for names in (labels, [*labels, *pairs[:2], "b.coarse.cls", "b.fine.cls"]):
        forms.write_tar(tmp_path / "t.tar", dict.fromkeys(names, b"1"))
        with pytest.raises(ValueError, match=r"samples of .*t.tar hold several labels: coarse.cls"):
            list_images(str(tmp_path / "t.tar"))
    (sample,), _, _ = group(*labels, pick=MemberPick("", "fine"))
    assert sample.cls.name == "a.fine.cls"
    twice = ["a.jpg", "a.png", "b.jpg", "b.png"]
    with pytest.raises(ValueError, match="several images: jpg, png; --image jpg"):
        group(*twice)[2].check("S")


def test_labels_apart_from_their_images_are_refused(tmp_path):
    names = ["x/a.jpg", "x/b.jpg", "x/a.cls", "x/b.cls", "x/c.jpg"]
    _, _, choices = group(*names)
    with pytest.raises(ValueError, match=r"2 labels of S do not .* e.g. x/a: .* --label -"):
        choices.check("S")
    tar = forms.write_tar(tmp_path / "t.tar", dict.fromkeys(names, b"1"))
    with pytest.raises(ValueError, match=r"2 labels of .*t.tar do not stand beside"):
        list_images(str(tar))
    assert len(list_images(str(tar), label="-")) == 3
    for pick in (MemberPick("", "-"), MemberPick("", "json")):
        group(*names, pick=pick)[2].check("S")
    folders = [*(f"images/{n}.jpg" for n in "abc"), *(f"labels/{n}.cls" for n in "abc")]
    tar = forms.write_tar(tmp_path / "folders.tar", dict.fromkeys(folders, b"1"))
    with pytest.raises(ValueError, match=r"3 labels of .*folders.tar do not .* e.g. labels/a: "):
        list_images(str(tar))
    group("x/a.jpg", "y/d.cls", "b.jpg", "c.cls")[2].check("S")  # no labels of these images


def test_label_members_of_other_names_are_told_and_can_be_asked_for():
    names = ["a.jpg", "a.class", "b.jpg", "b.class"]
    _, balance, choices = group(*names)
    assert choices.unused == {"class": 2}
    assert balance.left_out["label file that is not used"].count == 2
    samples, balance, _ = group(*names, pick=MemberPick("", "class"))
    assert [sample.cls.name for sample in samples] == ["a.class", "b.class"]
    assert not balance.left_out


def test_what_is_asked_for_by_name_and_is_not_there_is_refused(tmp_path):
    forms.write_tar(tmp_path / "s" / "t.tar", {"a.jpg": b"1", "a.cls": b"1"})
    forms.write_tree(tmp_path / "tree", {"cat/1.jpg": b"1"})
    for source in ("s", "tree"):
        with pytest.raises(ValueError, match=r"no image of .* has a label called klass"):
            list_images(str(tmp_path / source), label="klass")
    MemberPick("", "klass").check_label([None, 0], "S")
    with pytest.raises(ValueError, match=r"no image is called left \(--image\)"):
        list_images(str(tmp_path / "s"), image="left")
    with pytest.raises(ValueError, match=r"--image left names a member .*tree is a folder of im"):
        list_images(str(tmp_path / "tree"), image="left")
    (tmp_path / "s" / "t.tar").write_bytes(forms.tar_bytes({"a.jpg": forms.picture(1)}))
    with pytest.raises(ValueError, match=r"no image of .* has a label called klass"):
        index_tars(str(tmp_path / "s"), workers=1, pick=MemberPick("", "klass"), quiet=True)
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["t.tar"]


def test_labels_are_read_or_refused_by_name():
    cls, json = Member("a.cls", 0, 2), Member("a.json", 0, 20)
    image = Member("a.jpg", 0, 1)

    def label(sample, data, pick=NO_PICK):
        return read_label(sample, lambda member: data, "t.tar", pick)

    assert label(TarSample("a", image, cls, json), b" 7\n") == 7
    assert label(TarSample("a", image, None, json), b'{"label": 3}') == 3
    assert label(TarSample("a", image, None, json), b'{"taxon": 9}', MemberPick("", "taxon")) == 9
    assert label(TarSample("a", image, cls, json), b"7", MemberPick("", "-")) is None
    assert label(TarSample("a", image, None, None), b"") is None
    with pytest.raises(ValueError, match=r"a.cls in t.tar has 2000 bytes, a label file at most"):
        label(TarSample("a", image, Member("a.cls", 0, 2000), None), b"")


def test_an_array_is_the_image_of_a_sample_that_has_no_other():
    names = ("a.npy", "a.cls", "b.jpg", "b.npy", "b.cls", "c.npy")
    samples, balance, choices = group(*names)
    assert [named(sample)[:3] for sample in samples] == [
        ["a", "a.npy", "a.cls"],
        ["b", "b.jpg", "b.cls"],
        ["c", "c.npy", None],
    ]
    assert balance.omitted == 1 and not choices.images
    samples, _, _ = group(*names, pick=MemberPick(image="npy"))
    assert [sample.image.name for sample in samples] == ["a.npy", "b.npy", "c.npy"]
