"""Options of the shards: sizes in samples or bytes, and what makes no sense."""

import pytest

from data_prep.shard_options import ShardOptions, check_options, parse_shard_size


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1000", (1000, False)),
        ("256MB", (256_000_000, True)),
        ("1.5 gb", (1_500_000_000, True)),
        ("1GiB", (1 << 30, True)),
        ("64kib", (1 << 16, True)),
        ("700b", (700, True)),
    ],
)
def test_shard_sizes(text, wanted):
    assert parse_shard_size(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "0MB", "-5", "10M", "1.5", "many", "5 TB"])
def test_other_shard_sizes_are_refused(text):
    with pytest.raises(ValueError, match="neither samples"):
        parse_shard_size(text)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"resize": -1}, "--resize -1 is negative"),
        ({"quality": 101}, "--quality 101 is outside 1 to 100"),
        ({"reencode": True}, "--reencode needs --resize"),
        ({"split": "a/b"}, "--split 'a/b' names shards"),
        ({"shard_size": "x"}, "neither samples"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, match):
    check_options(ShardOptions(resize=8, reencode=True, quality=1, split="val_2"))
    with pytest.raises(ValueError, match=match):
        check_options(ShardOptions(**options))
