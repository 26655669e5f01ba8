"""What commands print is sharded as the files would be, where the user says so and not else."""

from pathlib import Path

import pytest

from data_prep import command_sources
from data_prep.source_options import SourceOptions
from data_prep.sources import list_images
from tests.data_prep import forms
from tests.data_prep.making import make_from_scratch

ALLOWED = SourceOptions(run_pipes=True)


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars of samples with labels."""
    for name in ("a", "b"):
        members = {}
        for number in range(3):
            members[f"{name}{number}.jpg"] = forms.picture(10 * ord(name) + number)
            members[f"{name}{number}.cls"] = f"{number}".encode()
        (tmp_path / f"{name}.tar").write_bytes(forms.tar_bytes(members))
    return tmp_path


def test_commands_give_what_their_files_would_give(tars: Path) -> None:
    source = f"pipe:cat {tars}/a.tar"
    with pytest.raises(ValueError, match=r"--run-pipes"):
        make_from_scratch(source, tars / "refused")
    source = f"pipe:cat {tars}/a.tar::{tars}/b.tar::pipe:cat {tars}/a.tar | cat"
    made = make_from_scratch(source, tars / "piped", options=ALLOWED)
    (tars / "c.tar").write_bytes((tars / "a.tar").read_bytes())
    wanted = make_from_scratch(f"{tars}/a.tar::{tars}/b.tar::{tars}/c.tar", tars / "wanted")
    assert made.samples == wanted.samples == 9
    assert sorted(made.index_N["label"]) == sorted(wanted.index_N["label"])
    assert sorted(made.index_N["crc32"]) == sorted(wanted.index_N["crc32"])


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("cat {}/a.tar; exit 3", r"pipe:cat \.\.\., command 1 of the source, ended with status 3"),
        ("true", r"pipe:true, command 1 of the source, printed nothing"),
        ("head -c 700 {}/a.tar", "cut"),
        ("TOKEN=secret false", r"pipe:\.\.\., command 1 of the source, ended with status 1"),
    ],
)
def test_a_command_that_fails_is_refused(tars: Path, command: str, sentence: str) -> None:
    source = f"pipe:{command.format(tars)}"
    with pytest.raises(ValueError, match=sentence) as error:
        make_from_scratch(source, tars / "out", options=ALLOWED)
    assert "secret" not in f"{error.value}"
    assert not (tars / "out").exists()


def test_nothing_runs_where_nothing_is_written(tars: Path) -> None:
    with pytest.raises(ValueError, match="only python -m data_prep shard runs"):
        list_images(f"pipe:touch {tars}/ran", options=ALLOWED, is_look=True)
    assert not (tars / "ran").exists()


def test_what_commands_say_of_their_users_is_stored_nowhere() -> None:
    shorten = command_sources.shorten_commands
    command = "pipe:curl -H 'Authorization: secret' https://host/t.tar"
    assert shorten(f"{command}::a.tar::pipe:true") == "pipe:curl ...::a.tar::pipe:true"
    assert "secret" not in shorten("pipe:KEY=secret aws s3 cp x -")
