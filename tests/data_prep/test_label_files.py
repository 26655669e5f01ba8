"""Labels from files that name the image of each, or give one a line."""

import csv

import pytest

from data_prep.class_numbers import ClassNames
from data_prep.label_files import read_image_labels
from data_prep.sources import list_images
from tests.data_prep import forms


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
    for odd in (4, 0):
        (tmp_path / "truth.txt").write_text(f"{odd}\n" * 6)
        with pytest.raises(ValueError, match=f"holds class {odd}, the class file has 3 names"):
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


IMAGES = ["a.jpg", "b.jpg", "x/img 1.jpg"]


def read(tmp_path, text, images=IMAGES, **options):
    path = tmp_path / "labels.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_image_labels(path, images, ClassNames(), **options)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a.jpg,cat\nb.jpg,dog\nimg 1.jpg,cat\n", ["cat", "dog", "cat"]),
        ('"img 1.jpg","cat, wild"\r\n"b.jpg","dog"\r\n"a.jpg","x ""y"""\r\n',
         ['x "y"', "dog", "cat, wild"]),
        ("image,label\na,African elephant\nb,African leopard\nx/img 1,Asian elephant\n",
         ["African elephant", "African leopard", "Asian elephant"]),
        ("a.jpg\tAfrican elephant\nb.jpg\tdog, wild\nimg 1.jpg\tdog\n",
         ["African elephant", "dog, wild", "dog"]),
        ("a.jpg great shark\nb.jpg dog\nx/img 1.jpg  dog\n", ["great shark", "dog", "dog"]),
        ("great shark a.jpg\ndog b.jpg\ndog x/img 1.jpg\n", ["great shark", "dog", "dog"]),
        ("cat,b.jpg\ndog,a.jpg\ncat,img 1.jpg\n", ["dog", "cat", "cat"]),
        ("\ufeffa.jpg;0\nb.jpg;1\nimg 1.jpg;10\n", [0, 1, 10]),
        ("# of the zoo\nphoto, species\na.jpg, cat\nb.jpg, dog\nimg 1.jpg, cat\n",
         ["cat", "dog", "cat"]),
        ("a.jpg,0.0\nb.jpg,1.0\nimg 1.jpg,-1\n", [0, 1, -1]),
        ("a.jpg,0\nb.jpg,\nimg 1.jpg,1\n", [0, -1, 1]),
        ("id,file,label,split\n0,a.jpg,cat,t\n1,b.jpg,dog,t\n2,img 1.jpg,cat,v\n",
         ["cat", "dog", "cat"]),
        (",image,target\n0,a.jpg,5\n1,b.jpg,6\n2,img 1.jpg,5\n", [5, 6, 5]),
        ("a.jpg,1\nb.jpg,2\nimg 1.jpg,1\na.jpg,1\n", [1, 2, 1]),  # twice, and the same
        ("cat\ndog\n\"great shark\"\n", ["cat", "dog", "great shark"]),
    ],
)  # fmt: skip
def test_files_are_read_as_what_they_are(tmp_path, text, labels):
    assert read(tmp_path, text).labels == labels


def test_columns_are_chosen_by_name(tmp_path):
    text = "image,coarse,fine\na.jpg,pet,cat\nb.jpg,pet,dog\nimg 1.jpg,wild,lion\n"
    with pytest.raises(ValueError, match=r"2 columns .* 'coarse', 'fine'; say which by --label NA"):
        read(tmp_path, text)
    assert read(tmp_path, text, label="coarse").labels == ["pet", "pet", "wild"]
    with pytest.raises(ValueError, match="no column 'x' for classes; there are 'coarse', 'fine'"):
        read(tmp_path, text, label="x")
    text = "".join(f"{image}\tn{n}\t0\t6{n}\n" for n, image in enumerate(IMAGES))
    with pytest.raises(ValueError, match=r"'column 2', 'column 3', .* by --label NAME"):
        read(tmp_path, text)
    assert read(tmp_path, text, label="column 2").labels == ["n0", "n1", "n2"]


def test_an_image_that_is_called_like_a_class_is_told_apart_by_its_ending_or_the_header(tmp_path):
    images = ["0.jpg", "1.jpg"]
    assert read(tmp_path, "0.jpg,1\n1.jpg,0\n", images).labels == [1, 0]
    assert read(tmp_path, "label,image\n1,0\n0,1\n", images).labels == [1, 0]
    with pytest.raises(ValueError, match="in columns 1 and 2, so that either may be the class"):
        read(tmp_path, "1,0\n0,1\n", images)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.jpg,x\nb.jpg,x\nimg 1.jpg,x\nc.jpg,x\n", "line 4: no image of the source is 'c.jpg'"),
        ("z.jpg,x\na.jpg,x\nb.jpg,x\nimg 1.jpg,x\n", "line 1: no image of the source is 'z.jpg'"),
        ("a.jpg,x\nb.jpg,y\n", "no label for 1 of 3 images, e.g. x/img 1.jpg"),
        ("a.jpg,x\nb.jpg,x\nimg 1.jpg,x\na.jpg,y\n", "lines 1 and 4 give 'a.jpg' two labels"),
        ("a.jpg,x\nb.jpg,x,z\nimg 1.jpg,x\n", "line 2: 3 fields, most rows have 2; put quotes"),
        ("a.jpg,0\nb.jpg,0.5\nimg 1.jpg,x\n", "line 2 of .* is 0.5; a label is one name or one"),
        ("cat,c.jpg\ndog,d.jpg\ndog,e.jpg\n", "names no image of the source, e.g. not in line 3"),
        ("African elephant\nlion\ntiger\n", "not in line 1, 'African elephant' .* in quotes"),
        ("cat\ndog\n", "2 lines for 3 images"),
        ("a.jpg\nb.jpg\nc.jpg\n", "names of images alone"),
        ('"a.jpg,x\nb.jpg,x\n', "line 2: unexpected end of data .as a file with comma"),
        ("id,PredictionString\na,n1 1 2 3 4 n2 1 2 3 4\nb,n1\nimg 1,n1\n", "line 2: 'n1', 'n2'"),
        ('{"a.jpg": 1, "b.jpg": 2}', "labels.csv looks like JSON; write a row"),
        (b"a.jpg,\xe9\n", "is not a text file in UTF-8"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused_by_their_line(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        read(tmp_path, text)


def test_a_row_that_may_mean_two_images_is_refused(tmp_path):
    images = ["cat/1.jpg", "dog/1.jpg"]
    with pytest.raises(ValueError, match=r"line 1: '1.jpg' may be 'cat/1.jpg' and 'dog/1.jpg'"):
        read(tmp_path, "1.jpg,x\ndog/1.jpg,y\n", images)
    assert read(tmp_path, "/d/cat/1.jpg,x\ndog/1.jpg,y\n", images).labels == ["x", "y"]


def test_lines_in_name_order_need_an_order_that_is_certain(tmp_path):
    images = [f"{number}.jpg" for number in range(9, 11)]
    with pytest.raises(ValueError, match=r"'10.jpg' comes before '9.jpg' as text"):
        read(tmp_path, "cat\ndog\n", images)


def test_images_without_a_row_are_kept_on_demand(tmp_path):
    assert read(tmp_path, "a.jpg,x\n", unlabelled="keep").labels == ["x", None, None]


def test_what_the_csv_module_writes_comes_back(tmp_path):
    rows = [("a.jpg", 'quote " and, comma'), ("b.jpg", "caf\u00e9"), ("x/img 1.jpg", "plain")]
    for dialect in ("excel", "excel-tab", "unix"):
        with (tmp_path / "labels.csv").open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, dialect).writerows([("image", "label"), *rows])
        content = (tmp_path / "labels.csv").read_bytes()
        assert read(tmp_path, content).labels == [label for _, label in rows]
