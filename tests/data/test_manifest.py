"""Manifests: what is written is read, and nothing in one from a stranger is trusted."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.manifest import ROW, Manifest, Shard
from tests.data.sets import make_set


@pytest.fixture
def folder(tmp_path):
    make_set(str(tmp_path / "set"), (3, 0, 4))
    return tmp_path / "set"


def edit(folder, change):
    """Load the JSON, let `change` alter the tree, write it back."""
    path = folder / manifests.NAME
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def edit_index(folder, change):
    """Alter the index and keep its digest right, as a stranger could."""
    manifest = manifests.load(str(folder))
    index_N = manifest.index_N.copy()
    change(index_N)
    manifests.write(str(folder), manifest.shards, index_N)


def test_what_is_written_is_loaded(tmp_path):
    shards = (Shard("a.tar", 9000, 2, "0" * 64), Shard("b.tar", 5000, 1, "1" * 64))
    index_N = np.zeros(3, ROW)
    index_N["offset"], index_N["size"], index_N["label"] = 512, [10, 20, 30], [0, 1, -1]
    manifests.write(str(tmp_path), shards, index_N, classes=["cat", "dog"], provenance={"seed": 1})
    for url in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/manifest.json", f"file://{tmp_path}"):
        loaded = manifests.load(url)
        assert loaded.shards == shards and loaded.classes == ("cat", "dog")
        assert loaded.provenance == {"seed": 1} and loaded.samples == 3 and loaded.bytes == 14000
        np.testing.assert_array_equal(loaded.index_N, index_N)
        assert not loaded.has_labels and loaded.first_S.tolist() == [0, 2, 3]
        assert loaded.shard_url(1).endswith(f"{tmp_path}/b.tar")


def test_the_digest_is_of_the_samples_not_of_the_folder(folder, tmp_path):
    one = manifests.load(str(folder))
    moved = Manifest("elsewhere", one.shards, one.index_N, ("x",), {"seed": 9})
    assert moved.digest == one.digest
    other = Manifest(one.url, one.shards, one.index_N[::-1])
    assert other.digest != one.digest


def test_shards_that_lie_elsewhere(folder, tmp_path):
    one, place = manifests.load(str(folder)), str(tmp_path / "else where")
    assert one.shards_at == "" and one.shards_url == one.url
    assert "shards_at" not in json.loads((folder / manifests.NAME).read_text())
    assert one.index_command == f"python -m data_prep index --replace {folder}"
    manifests.write(place, one.shards, one.index_N, shards_at=str(folder))
    other = manifests.load(place)
    assert other.url == place and other.shard_url(2) == one.shard_url(2)
    assert other.digest == one.digest, "a run goes on with the same set, wherever its manifest lies"
    assert other.first_samples(3).shard_url(0) == one.shard_url(0)
    assert other.index_command.endswith(f"--replace {folder} --manifest '{place}'")
    with (
        pytest.raises(FileNotFoundError, match=r"t-000\.tar.*'.*else where'.*'.*/set'; bring"),
        other.name_places(),
    ):
        Path(f"{folder}/gone/t-000.tar").read_bytes()
    with pytest.raises(FileNotFoundError, match="directory: 'gone'"), one.name_places():
        Path("gone").read_bytes()


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match=r"holds no manifest\.json; make shards with .* data_prep"):
        manifests.load(str(tmp_path))


NAMES = ["../x.tar", "/etc/passwd", "a/b.tar", "..", "", ".", "a\\b", "s3://b/x", "a\0b"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere_are_refused(folder, name):
    edit(folder, lambda tree: tree["shards"][0].update(name=name))
    with pytest.raises(ValueError, match="is not a plain file name"):
        manifests.load(str(folder))


def put(key, value, shard=0):
    return lambda tree: tree["shards"][shard].update({key: value})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda tree: tree.update(format="other"), "format is 'other'"),
        (lambda tree: tree.update(version=2), "version 2 is later than this program's 1"),
        (lambda tree: tree.pop("shards"), "no entry 'shards'"),
        (lambda tree: tree.update(shards=[1]), "cannot be used"),
        (lambda tree: tree.update(shards=None), "cannot be used"),
        (lambda tree: tree.update(made=3), "cannot be used"),
        (put("samples", -1), "-1 samples"),
        (put("bytes", -1), "-1 bytes"),
        (put("bytes", 10**30), "bytes and 3 samples"),
        (put("samples", 10**18), "1000000000000000000 samples"),
        (put("samples", 4), "is said to have 224 bytes where 8 samples need 256"),
        (put("bytes", float("inf")), "cannot be used"),
        (put("bytes", float("nan")), "cannot be used"),
        (put("samples", "many"), "cannot be used"),
        (put("sha256", "../../etc"), "has no sha256"),
        (put("sha256", "A" * 64), "has no sha256"),
        (put("name", "t-002.tar"), "names a shard twice"),
        (put("bytes", 3100), "points outside the shards"),
        (lambda tree: tree["index"].update(bytes=10**15), "is said to have 1000000000000000 bytes"),
        (lambda tree: tree["index"].update(sha256="0" * 64), "not the one that was written"),
        (lambda tree: tree["shards"].clear(), "bytes where 0 samples need 0"),
        (lambda tree: tree.update(shards_at="../set"), "'../set' is neither an absolute path nor"),
        (lambda tree: tree.update(shards_at=None), "shards_at is 'None', which is no path"),
    ],
)
def test_absurd_manifests_are_refused(folder, change, words):
    edit(folder, change)
    with pytest.raises(ValueError, match=words):
        manifests.load(str(folder))


@pytest.mark.parametrize("field, value", [
    ("offset", 0), ("offset", 511), ("offset", 2**64 - 1), ("offset", 2**63), ("size", 10**6),
])  # fmt: skip
def test_an_index_that_points_outside_is_refused(folder, field, value):
    def change(index_N):
        index_N[field][2] = value

    edit_index(folder, change)
    with pytest.raises(ValueError, match="points outside the shards"):
        manifests.load(str(folder))


@pytest.mark.parametrize("size", [2**28 + 1, 2**32 - 1])
def test_a_gigantic_sample_is_refused(folder, size):
    edit(folder, put("bytes", 2**40, shard=2))

    def change(index_N):
        index_N["size"][4] = size

    edit_index(folder, change)
    with pytest.raises(ValueError, match=rf"a sample of {size} bytes"):
        manifests.load(str(folder))


def test_gigantic_files_are_not_read(folder, monkeypatch):
    def no_read(*_):
        raise AssertionError("read")

    with monkeypatch.context() as patch:
        patch.setattr(manifests.storage, "read", no_read)
        with pytest.raises(ValueError, match=r"manifest.json has \d+ bytes, 100 at most are read"):
            manifests.load(str(folder), manifest_limit=100)
    with pytest.raises(ValueError, match=r"index.bin has \d+ bytes, 100 at most are read"):
        manifests.load(str(folder), index_limit=100)
    os.truncate(folder / manifests.NAME, 1 << 40)  # sparse
    with pytest.raises(ValueError, match=r"manifest\.json has 1099511627776 bytes"):
        manifests.load(str(folder))


def test_a_missing_or_other_index_is_refused(folder):
    index = folder / manifests.INDEX_NAME
    rows = index.read_bytes()
    index.write_bytes(rows[:-1] + b"\1")
    with pytest.raises(ValueError, match="not the one that was written"):
        manifests.load(str(folder))
    index.unlink()
    with pytest.raises(ValueError, match="names files that are not there"):
        manifests.load(str(folder))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_at_all_is_refused(folder, text):
    (folder / manifests.NAME).write_bytes(text)
    with pytest.raises(ValueError, match="cannot be used"):
        manifests.load(str(folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_altered_manifest_loads_or_is_refused_in_one_sentence(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        make_set(str(folder), (2, 1))
        (folder / "kept.json").write_bytes((folder / manifests.NAME).read_bytes())
    tree = json.loads((folder / "kept.json").read_text())
    place = data.draw(st.sampled_from([tree, tree["index"], *tree["shards"]]))
    key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(JSON)
    Path(folder / manifests.NAME).write_text(json.dumps(tree))
    try:
        assert manifests.load(str(folder)).samples == 3
    except ValueError as error:
        assert "\n" not in str(error)


def test_the_first_samples_of_a_set(folder):
    manifest = manifests.load(str(folder))
    assert [s.samples for s in manifest.first_samples(2).shards] == [2]
    four = manifest.first_samples(4)
    assert (four.samples, four.first_S.tolist()[-1]) == (4, 4)
    assert [s.samples for s in four.shards] == [3, 0, 1]
    np.testing.assert_array_equal(four.index_N, manifest.index_N[:4])
    assert len({m.digest for m in (manifest, four, manifest.first_samples(2))}) == 3
    assert manifest.first_samples(7).digest == manifest.digest
    for count in (-1, 0, 8):
        with pytest.raises(ValueError, match=f"7 samples; {count} cannot be taken"):
            manifest.first_samples(count)
