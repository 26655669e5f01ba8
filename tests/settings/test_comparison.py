"""Settings of two starts: each difference is a sentence with the dotted name."""

from mocov3_ds.settings.comparison import differences


def test_nothing_differs() -> None:
    settings = {"a": 1, "b": {"c": [1, 2]}}
    assert list(differences(settings, {"b": {"c": [1, 2]}, "a": 1.0})) == []


def test_inner_settings_have_dotted_names() -> None:
    earlier = {"batch": 256, "model": {"dim": 384, "depth": 12}}
    present = {"batch": 512, "model": {"dim": 384, "depth": 6}}
    assert list(differences(earlier, present)) == [
        "batch is 256 there, 512 here",
        "model.depth is 12 there, 6 here",
    ]
    assert next(differences({"a": 1}, {"a": 2}, "config")) == "config.a is 1 there, 2 here"


def test_what_only_one_of_them_has() -> None:
    assert list(differences({"a": 1}, {"b": 2})) == [
        "a is 1 there, None here",
        "b is None there, 2 here",
    ]
    assert list(differences({"a": {"b": 1}}, {"a": 1})) == ["a is {'b': 1} there, 1 here"]
