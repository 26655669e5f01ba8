"""Class names from a text file, in the forms that people have them."""

import pytest

from data_prep.class_files import read_class_names


@pytest.mark.parametrize(
    ("text", "used", "names"),
    [
        ("cat\ndog\n", {"cat"}, ("cat", "dog")),
        ("\ufeffcat\r\ndog\r\n", {"cat"}, ("cat", "dog")),
        ("African leopard\nAfrican elephant\n", {"African elephant"}, None),
        ("African leopard\nAsian elephant\n", {"African", "Asian"}, ("African", "Asian")),
        ("n01440764 tench, Tinca\nn01443537 goldfish\n", {"n01443537"}, ("n01440764", "n01443537")),
        ("/a/airfield 0\n/a/alley 1\n", {"/a/alley"}, ("/a/airfield", "/a/alley")),
        ("2,grey fox\n1,red fox\n", {"red fox"}, ("red fox", "grey fox")),
        ("cat\tFelis catus\ndog\tCanis lupus\n", {"dog"}, ("cat", "dog")),
        ('"cat, wild"\n"dog"\n', {"cat, wild"}, ("cat, wild", "dog")),
        ("cafe\u0301\nzoo\n", {"caf\u00e9"}, ("caf\u00e9", "zoo")),
        ("10\n2\n", {"2"}, ("10", "2")),
    ],
)
def test_the_classes_in_use_tell_what_a_line_is(tmp_path, text, used, names):
    (tmp_path / "c.txt").write_bytes(text.encode())
    classes = read_class_names(tmp_path / "c.txt")
    wanted = names or tuple(text.splitlines())
    assert classes.choose_reading(used, "source") == wanted


def test_numbers_get_synsets_where_lines_begin_with_them_and_else_whole_lines(tmp_path):
    (tmp_path / "c.txt").write_text("1 n02119789 kit fox, Vulpes\n2 n02100735 English setter\n")
    assert read_class_names(tmp_path / "c.txt").readings[0] == ("n02119789", "n02100735")
    (tmp_path / "c.txt").write_text("great white shark\ntench\n")
    assert read_class_names(tmp_path / "c.txt").readings[0] == ("great white shark", "tench")


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "c.txt"
    with pytest.raises(ValueError, match=r"there is no .*c.txt"):
        read_class_names(path)
    with pytest.raises(ValueError, match="is a folder"):
        read_class_names(tmp_path)
    for content, match in (
        (b"\n \n", "is empty"),
        (b"\xff\xfe\n", "is not a text file"),
        (b"a\0b\n", "is not a text file"),
        (b"a b\na b\n", "names class 'a b' twice|names class a b twice"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=match):
            read_class_names(path)
    path.write_bytes("cat\ndog\n".encode("utf-16"))
    assert read_class_names(path).readings[0] == ("cat", "dog")
    with pytest.raises(ValueError, match=r"source holds 1 classes that .*c.txt does not name.*fox"):
        read_class_names(path).choose_reading({"cat", "fox"}, "source")
