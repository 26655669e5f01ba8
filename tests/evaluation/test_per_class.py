"""The table of classes."""

from pathlib import Path

import torch

from mocov3_ds.evaluation.per_class import count_by_class, write_class_table

LABELS = torch.tensor([0, 0, 0, 2, 2, 7, 0])
CLASSES = torch.tensor([0, 2, 7, 2, 2, 0, 7])


def test_each_class_is_counted_with_what_it_is_taken_for() -> None:
    assert count_by_class(CLASSES, LABELS) == [
        (0, 4, 1, 7, 2),
        (2, 2, 2, -1, 0),
        (7, 1, 0, 0, 1),
    ]


def test_the_table_names_classes(tmp_path: Path) -> None:
    names = ["cat", "", "a, b", *"3456", "dog"]
    write_class_table(tmp_path / "new" / "table.csv", CLASSES, LABELS, names)
    assert (tmp_path / "new" / "table.csv").read_text() == (
        "class,images,top1,most_confused_with,confused\n"
        'cat,4,25.00,dog,50.00\n"a, b",2,100.00,,\ndog,1,0.00,cat,100.00\n'
    )
    write_class_table(tmp_path / "table.csv", CLASSES, LABELS, [])
    assert "\n7,1,0.00,0,100.00\n" in (tmp_path / "table.csv").read_text()


def test_no_name_of_a_class_becomes_a_formula(tmp_path: Path) -> None:
    write_class_table(tmp_path / "table.csv", CLASSES, LABELS, ["=1+1", *"123456", "@x"])
    lines = (tmp_path / "table.csv").read_text().splitlines()
    assert lines[1:] == ["'=1+1,4,25.00,'@x,50.00", "2,2,100.00,,", "'@x,1,0.00,'=1+1,100.00"]
