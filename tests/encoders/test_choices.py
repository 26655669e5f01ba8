"""What can be chosen of an encoder on a command line is what the code can do."""

from typing import get_args

from mocov3_ds.encoders.choices import EncoderRole, Format
from mocov3_ds.encoders.export import WRITERS


def test_every_program_has_a_writer() -> None:
    assert {*get_args(Format)} == {*WRITERS}


def test_there_are_two_encoders() -> None:
    assert get_args(EncoderRole) == ("base", "momentum")
