"""Options of sources decide nothing unless they are given."""

from data_prep.source_options import SourceOptions


def test_nothing_is_decided_beforehand():
    assert vars(SourceOptions()) == {
        "files": "",
        "class_level": "",
        "run_pipes": False,
        "empty_classes": "refuse",
    }
