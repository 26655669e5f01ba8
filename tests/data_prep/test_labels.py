"""Labels and class names from files and from members of tars."""

import pytest

from data_prep import labels
from data_prep.labels import read_class_names
from data_prep.sources import list_images
from tests.data_prep import forms

IMAGES = forms.imagenet(4)


@pytest.fixture
def tree(tmp_path):
    return forms.write_tree(tmp_path / "tree", IMAGES)


def val(tmp_path, count=6):
    """A validation archive: images without folders, and the class each is of."""
    images = {f"ILSVRC2012_val_{n + 1:08d}.JPEG": forms.picture(n) for n in range(count)}
    wanted = [forms.CLASSES[n * 7 % 3] for n in range(count)]
    return str(forms.write_tar(tmp_path / "ILSVRC2012_img_val.tar", images)), wanted


def labels_in_order(listing):
    return [listing.classes[label] for label in listing.label_N]


def test_validation_labels_in_every_form_of_the_file(tmp_path):
    source, wanted = val(tmp_path)
    names = [f"ILSVRC2012_val_{n + 1:08d}" for n in range(6)]
    file = tmp_path / "labels.txt"
    lists = {
        "a synset a line": "\n".join(wanted),
        "image and synset": "\n".join(
            f"{name}.JPEG {w}" for name, w in reversed([*zip(names, wanted, strict=True)])
        ),
        "Kaggle": "ImageId,PredictionString\n"
        + "\n".join(f"{name},{w} 1 2 3 4" for name, w in zip(names, wanted, strict=True)),
    }
    for what, text in lists.items():
        file.write_text(text + "\n")
        listing = list_images(source, labels=file)
        assert labels_in_order(listing) == wanted, what
        assert listing.classes == tuple(sorted({*wanted}))


def test_the_kits_own_numbers_are_translated_by_name(tmp_path):
    source, wanted = val(tmp_path)
    kit_order = ["n02102040", "n01440764", "n01443537"]
    (tmp_path / "truth.txt").write_text("".join(f"{kit_order.index(w) + 1}\n" for w in wanted))
    (tmp_path / "kit.txt").write_text("".join(f"{name} words\n" for name in kit_order))
    listing = list_images(source, labels=tmp_path / "truth.txt", classes=tmp_path / "kit.txt")
    assert labels_in_order(listing) == wanted
    assert listing.classes == forms.CLASSES, "numbered as the training set is: by sorted name"
    with pytest.raises(ValueError, match=r"order of its own.*add --classes"):
        list_images(source, labels=tmp_path / "truth.txt")
    (tmp_path / "truth.txt").write_text("4\n" * 6)
    with pytest.raises(ValueError, match="holds class 4, the class file has 3 names"):
        list_images(source, labels=tmp_path / "truth.txt", classes=tmp_path / "kit.txt")


def test_numbers_beside_image_names_are_taken_as_they_are(tmp_path):
    source, wanted = val(tmp_path)
    lines = [
        f"ILSVRC2012_val_{n + 1:08d}.JPEG {forms.CLASSES.index(w)}" for n, w in enumerate(wanted)
    ]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    listing = list_images(source, labels=tmp_path / "val.txt")
    assert listing.label_N.tolist() == [forms.CLASSES.index(w) for w in wanted]
    (tmp_path / "names.txt").write_text("\n".join(forms.CLASSES))
    named = list_images(source, labels=tmp_path / "val.txt", classes=tmp_path / "names.txt")
    assert labels_in_order(named) == wanted


def test_a_class_file_numbers_a_tree(tree, tmp_path):
    (tmp_path / "order.txt").write_text("n02102040\nn01440764 tench\nn01443537\nn00000000\n")
    listing = list_images(str(tree), classes=tmp_path / "order.txt")
    assert listing.classes == ("n02102040", "n01440764", "n01443537", "n00000000")
    assert sorted({*listing.label_N.tolist()}) == [0, 1, 2]
    assert listing.label_N[0] == 1  # n01440764


def test_bad_label_and_class_files_are_refused_in_one_sentence(tree, tmp_path):
    source, _ = val(tmp_path)
    file = tmp_path / "labels.txt"

    def refused(text, match, source=source, **options):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=match):
            list_images(source, **(options or {"labels": file}))

    refused(b"\n", "labels.txt is empty")
    refused(b"\xff\xfe\n", "is not a text file")
    refused(b"cat\ndog\n", "has 2 lines for 6 images")
    refused(
        b"ILSVRC2012_val_00000001.JPEG 3\n", "no label for 5 of 6 images, e.g. ILSVRC2012_val_0"
    )
    refused(b"a\nb\na\n", "names class a twice", str(tree), classes=file)
    refused(
        b"n01440764\n", "holds 2 classes that the class file does not name", str(tree), classes=file
    )
    with pytest.raises(ValueError, match=r"there is no .*nothing.txt"):
        read_class_names(tmp_path / "nothing.txt")
    for members, match in (
        ({"a.jpg": forms.picture(0), "a.cls": b"x" * 2000}, "a.cls .* has 2000 bytes"),
        ({"a.jpg": forms.picture(0), "a.cls": b" "}, "a.cls .* is empty"),
        ({"a.jpg": forms.picture(0), "a.json": b"{"}, "a.json .* is not valid JSON"),
    ):
        with pytest.raises(ValueError, match=match):
            list_images(str(forms.write_tar(tmp_path / "w.tar", members)))


@pytest.mark.parametrize(
    ("labels_given", "classes", "numbers", "names"),
    [
        (["b", "a", "b"], [], [1, 0, 1], ["a", "b"]),
        (["b", "a"], ["b", "a", "c"], [0, 1], ["b", "a", "c"]),
        ([3, None, 0], [], [3, -1, 0], []),
        ([7, "x"], [], [0, 1], ["7", "x"]),  # a class folder may be called 7
    ],
)
def test_labels_become_numbers(labels_given, classes, numbers, names):
    images = [f"{n}.jpg" for n in range(len(labels_given))]
    assert labels.number_labels(labels_given, classes, "source", images) == (numbers, names)


def test_labels_of_members():
    assert labels.parse_cls(b" -1\n", "a.cls") == -1 and labels.parse_cls(b"dog", "a.cls") == "dog"
    for text, label in ((b'{"label": 3}', 3), (b'{"cls": "x"}', "x"), (b'{"label": true}', None)):
        assert labels.parse_json_label(text, "a.json") == label
    assert labels.parse_json_label(b"[1]", "a.json") is None
