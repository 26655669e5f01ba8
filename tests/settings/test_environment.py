"""The environment is read by kind, once at the start, and misspelt names are told."""

import re

import pytest

from mocov3_ds.settings import environment
from mocov3_ds.settings.environment import check_environment, read_number, read_word


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("MOCOV3_STORAGE_PATIENCE_S", "15min", "is no number; it must be 0 to 2592000, e.g. 900"),
        ("MOCOV3_STORAGE_PATIENCE_S", "nan", "cannot be; it must be 0 to 2592000"),
        ("MOCOV3_STORAGE_STALL_S", "inf", "cannot be"),
        ("MOCOV3_STORAGE_CONNECT_S", "-1", "cannot be"),
        ("WORLD_SIZE", "2.5", "is no whole number; it must be 1 to"),
        ("MASTER_PORT", "99999", "it must be 1 to 65535"),
        ("SLURM_NTASKS", "4(x2)", "is no whole number"),
        ("MOCOV3_DS_DECODER", "pilow", "none of native, simplejpeg, pillow (did you mean pillow?)"),
        ("DS_ACCELERATOR", "gpu", "is none of cuda, cpu"),
        ("MOCOV3_STORAGE_PATIENCE", "9", "nothing reads the environment variable"),
    ],
)
def test_what_cannot_be_is_a_sentence_at_the_start(
    name: str, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        check_environment()
    assert name in str(refused.value)
    assert "\n" not in str(refused.value)


def test_unset_and_empty_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.NUMBERS, *environment.CHOICES):
        monkeypatch.setenv(name, " ")
    check_environment()
    assert read_number("MOCOV3_STORAGE_PATIENCE_S") == 900
    assert read_word("MOCOV3_DS_DECODER") == ""
    monkeypatch.setenv("MOCOV3_STORAGE_PATIENCE_S", "1.5e2")
    monkeypatch.setenv("MOCOV3_DS_DECODER", "pillow")
    assert (read_number("MOCOV3_STORAGE_PATIENCE_S"), read_word("MOCOV3_DS_DECODER")) == (
        150,
        "pillow",
    )


def test_names_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOCOV3_TEST_IMAGES", "MOCOV3_DS_FUZZ", "MOCOV3", "PATIENCE_S"):
        monkeypatch.setenv(name, "anything")
    check_environment()
