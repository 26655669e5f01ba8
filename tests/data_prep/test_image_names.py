"""Images found by what another list calls them."""

from data_prep.image_names import ImageNames

NAMES = ["cat/1.jpg", "cat/2.png", "dog/1.jpg", "3.jpg", "deep/cat/4.5.JPEG", "x/caf\u00e9.jpg"]


def test_the_longest_path_that_both_have_decides():
    known = ImageNames(NAMES)
    for name, rows in {
        "cat/1.jpg": [0],
        "/home/me/train/dog/1.jpg": [2],
        "./cat\\2.png": [1],
        "2.png": [1],
        "2": [1],
        "cat/2.jpg": [1],  # the image was stored in another format since
        "1.jpg": [0, 2],
        "1": [0, 2],
        "3.jpg": [3],
        "elsewhere/3.jpg": [3],
        "4.5": [4],
        "cat/4.5.JPEG": [4],
        "x/cafe\u0301.jpg": [5],
        "bird/1.jpg": [],
        "11.jpg": [],
        "": [],
    }.items():
        assert known.find_images(name) == rows, name
    assert ImageNames(["1.jpg", "cat/1.jpg"]).find_images("1.jpg") == [0], "the whole path"
    assert ImageNames(["a.jpg", "a.png"]).find_images("a.png") == [1]
    assert ImageNames(["a.jpg", "a.png"]).find_images("a") == [0, 1]
