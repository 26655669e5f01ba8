"""Classes keep their numbers, whatever else a set holds."""

import re

import pytest

from data_prep.class_numbers import ClassNames, number_labels


def number(labels, names=(), numbers="positions", **options):
    classes = ClassNames((tuple(names),), "names.txt", numbers) if names else ClassNames()
    images = [f"{n}.jpg" for n in range(len(labels))]
    return number_labels(labels, classes, "source", images, **options)


@pytest.mark.parametrize(
    ("labels", "options", "numbers", "names"),
    [
        (["b", "a", "b"], {}, [1, 0, 1], ("a", "b")),
        (["b", "a"], {"names": "bac"}, [0, 1], ("b", "a", "c")),
        (["10", "2", "11"], {}, [10, 2, 11], ()),  # text that is a number is a number
        ([10, "2", 9_000_000], {}, [10, 2, 9_000_000], ()),
        ([3, -1, None, 0], {"unlabelled": "keep"}, [3, -1, -1, 0], ()),
        ([3, None, 0], {}, [3, -1, 0], ()),
        ([-1, None], {}, [-1, -1], ()),  # a test set without labels
        (["x", "y", 7], {}, [1, 2, 0], ("7", "x", "y")),  # a class folder may be called 7
        (["unknown", 1, 0], {"names": ["0", "1", "unknown"]}, [2, 1, 0], ("0", "1", "unknown")),
        ([10**10, 5, 2**40], {}, [1, 0, 2], ("5", "10000000000", "1099511627776")),
        ([1, 0], {"names": ["cat", "dog"]}, [1, 0], ("cat", "dog")),
        ([7, 300], {"names": ["300", "7"], "numbers": "unknown"}, [1, 0], ("300", "7")),
        (
            [2, 10],
            {"names": ["0", "1", "10", "2"], "numbers": "unknown"},
            [3, 2],
            ("0", "1", "10", "2"),
        ),
        ([1, 0], {"names": ["0", "1", "10", "2"]}, [1, 0], ("0", "1", "10", "2")),
        (["cafz", "cafe\u0301"], {}, [0, 1], ("cafz", "caf\u00e9")),
        (["cat", "fox"], {"empty_classes": ["dog"]}, [0, 2], ("cat", "dog", "fox")),
        (["3", "7"], {"empty_classes": ["5", "docs"]}, [3, 7], ()),
    ],
)
def test_labels_become_numbers(labels, options, numbers, names):
    numbered = number(labels, **options)
    assert (numbered.numbers, numbered.names) == (numbers, names)


@pytest.mark.parametrize(
    ("labels", "options", "match"),
    [
        ([0, 1, "unknown"], {}, "'unknown' of '2.jpg', but 0 of '0.jpg'.*--classes FILE"),
        ([0, "x"], {}, "names among labels that are numbers"),
        ([0, 1, -1], {}, r"1 of 3 images .* 2.jpg \(label -1 or none\).*--unlabelled keep"),
        (["a", None], {}, "1 of 2 images of source have no class, e.g. 1.jpg; put every image"),
        ([0, -2], {}, "label -2 of '1.jpg'"),
        (["7", "007"], {}, "one class in two ways, '007' and '7'"),
        (["caf\u00e9", "cafe\u0301"], {}, r"two ways, 'cafe\\u0301' and 'caf\\xe9'"),
        ([2], {"names": ["a", "b"]}, "label 2 of '0.jpg', names.txt names 2 classes"),
        (["a", "d"], {"names": "abc"}, "1 classes that names.txt does not name, e.g. 'd'"),
        (
            [2, 3],
            {"names": ["3", "1", "10", "2"], "numbers": "unknown"},
            "label 2 of source may be class '2' or position 2 .*'10'",
        ),
    ],
)
def test_what_would_move_a_class_is_refused_by_name(labels, options, match):
    with pytest.raises(ValueError, match=match):
        number(labels, **options)


def test_what_is_not_plain_to_see_is_told():
    [note] = number([2**31, 0]).notes
    assert re.search(r"up to 2147483648, .* the 2 ids are class names", note)
    for labels, options in ((["a", None], {"unlabelled": "keep"}), ([0, None], {})):
        [note] = number(labels, **options).notes
        assert note.endswith("e.g. 1.jpg; they are kept without one")
