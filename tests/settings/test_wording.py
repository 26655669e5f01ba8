"""Counts in messages."""

from mocov3_ds.settings.wording import count_noun


def test_the_noun_follows_the_count():
    assert [count_noun(n, "rank") for n in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]
