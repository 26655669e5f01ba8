"""Samples with all their members: what webdataset's own reader gives, byte for byte."""

import io
import tarfile

import numpy as np
import pytest
import webdataset

from data_prep.index import index_tars
from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import whole_samples
from mocov3_ds.data.whole_samples import read_whole_samples
from tests.data.sets import make_set, picture


def write_tar(path, members, *, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))


def members_of(number, order):
    """All members of a sample, the image among them at some place."""
    kinds = {
        "jpg": picture(number),
        "cls": b"%d" % (number % 3),
        "json": b'{"n": %d}' % number,
        "TXT": b"text" * (number % 5 * 200),
        "seg.npy": bytes(number % 700),
    }
    return [(f"d/{'long' * 40}/s{number}.{kind}", kinds[kind]) for kind in order]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Shards as others write them: other places of the image, long names, folders, meta files."""
    folder = tmp_path_factory.mktemp("odd")
    orders = [["jpg", "cls", "json"], ["cls", "jpg", "seg.npy"], ["json", "TXT", "cls", "jpg"]]
    first = [member for n in range(9) for member in members_of(n, orders[n % 3])]
    second = [("d", None), ("__info__.json", b"{}"), ("README", b"hello")]
    for n in range(9, 15):
        second += members_of(n, orders[n % 3])
        second += [("note", b"x" * 700)] if n % 2 else []
    write_tar(folder / "a.tar", first)
    write_tar(folder / "b.tar", second, form=tarfile.GNU_FORMAT)
    write_tar(folder / "c.tar", members_of(20, orders[1]), form=tarfile.PAX_FORMAT)
    index_tars(str(folder), workers=1, quiet=True)
    return manifests.load(str(folder))


def by_webdataset(manifest):
    """What its reader gives; it leaves its files open."""
    urls = [manifest.shard_url(shard) for shard in range(len(manifest.shards))]
    reader = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    samples = [{k: v for k, v in s.items() if k != "__local_path__"} for s in reader]
    return [sample for sample in samples if "jpg" in sample]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_samples_are_those_of_webdataset(odd):
    expected = by_webdataset(odd)
    assert len(expected) == odd.samples == 16
    assert {len(sample) for sample in expected} >= {5, 6}
    for ids_M in (np.arange(16), np.random.default_rng(0).permutation(16), np.array([7, 3, 12])):
        read = dict(read_whole_samples(odd, ids_M))
        assert [read[place] for place in range(len(ids_M))] == [expected[i] for i in ids_M]
    for sample_id in range(16):
        assert dict(read_whole_samples(odd, np.array([sample_id]))) == {0: expected[sample_id]}


def test_neighbours_are_read_together_and_no_more_than_the_limit(odd, monkeypatch):
    reads = []
    read = whole_samples.storage.read

    def noted(url, begin, end, **options):
        reads.append(end - begin)
        return read(url, begin, end, **options)

    monkeypatch.setattr(whole_samples.storage, "read", noted)
    assert len([*read_whole_samples(odd, np.arange(16))]) == 16 and len(reads) == 3
    monkeypatch.setattr(whole_samples, "RUN_LIMIT", 9000)
    reads.clear()
    assert len([*read_whole_samples(odd, np.arange(16))]) == 16
    assert len(reads) > 3
    monkeypatch.setattr(whole_samples, "RUN_LIMIT", 1 << 30)
    monkeypatch.setattr(whole_samples, "GAP", 0)
    reads.clear()
    assert len([*read_whole_samples(odd, np.array([0, 4, 8]))]) == 3 and len(reads) == 3


@pytest.mark.parametrize("place, words", [("image", "crc32 mismatch"), ("header", "no tar header")])
def test_damage_stays_with_its_sample(tmp_path, place, words):
    manifest = make_set(str(tmp_path / "set"), [6])
    offset = int(manifest.index_N["offset"][2])
    path = tmp_path / "set" / manifest.shards[0].name
    damaged = bytearray(path.read_bytes())
    damaged[offset + 5 if place == "image" else offset - 500] ^= 1
    path.write_bytes(damaged)
    good = [number for number in range(6) if number != 2]
    assert len(dict(read_whole_samples(manifest, np.array(good)))) == 5
    with pytest.raises(ValueError, match=f"sample 2 in .*t-000.*{words}.* at byte {offset}"):
        list(read_whole_samples(manifest, np.arange(6)))


def test_a_wrong_answer_is_asked_for_again(tmp_path, monkeypatch):
    manifest = make_set(str(tmp_path / "set"), [6])
    read, answers = whole_samples.storage.read, iter([b"", b"\1" * 40_000])
    monkeypatch.setattr(
        whole_samples.storage, "read", lambda *a, **k: next(answers, None) or read(*a, **k)
    )
    assert len(dict(read_whole_samples(manifest, np.arange(6)))) == 6


def test_what_webdataset_would_refuse_is_refused(tmp_path):
    folder = tmp_path / "twice"
    folder.mkdir()
    write_tar(folder / "a.tar", [("a.jpg", picture(1)), ("a.JPG", picture(2)), ("b.jpg", b"x")])
    row = np.zeros(1, manifests.ROW)
    row["offset"], row["size"] = 512, len(picture(1))
    row["crc32"] = whole_samples.zlib.crc32(picture(1))
    shard = manifests.Shard("a.tar", (folder / "a.tar").stat().st_size, 1, "0" * 64)
    manifest = manifests.write(str(folder), [shard], row)
    with pytest.raises(ValueError, match=r"a key with two images .*'a\.jpg'"):
        list(read_whole_samples(manifest, np.array([0])))


def test_an_index_out_of_order_is_refused(tmp_path):
    made = make_set(str(tmp_path / "set"), [4])
    manifests.write(str(tmp_path / "set"), made.shards, made.index_N[::-1])
    with pytest.raises(ValueError, match=r"sample 1 in .* index --replace"):
        list(read_whole_samples(manifests.load(str(tmp_path / "set")), np.array([1])))
