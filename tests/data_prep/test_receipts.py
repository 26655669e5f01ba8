"""Receipts: what is finished is kept, what is damaged is made again."""

import numpy as np
import pytest

from data_prep.receipts import Receipt, Reject, find_finished, receipt_url, write_receipt
from mocov3_ds.data import manifest, storage
from mocov3_ds.data.manifest import Shard
from tests.data_prep import forms
from tests.data_prep.making import make


def test_a_second_run_rewrites_nothing(tree, tmp_path):
    make(tree, tmp_path / "out")
    before = {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")}
    content = forms.files_of(tmp_path / "out")
    summary = make(tree, tmp_path / "out", workers=2)
    assert summary.earlier_shards == 5 and "5 shards were finished before" in str(summary)
    assert {path: path.stat().st_ino for path in (tmp_path / "out").glob("*.tar")} == before
    assert forms.files_of(tmp_path / "out") == content


def test_damaged_and_missing_shards_and_receipts_are_made_again(tree, tmp_path):
    out = tmp_path / "out"
    make(tree, out)
    content = forms.files_of(out)
    flipped = bytearray((out / "shard-000000.tar").read_bytes())
    flipped[700] ^= 1
    (out / "shard-000000.tar").write_bytes(flipped)
    (out / "shard-000001.tar").unlink()
    (out / "receipts" / "shard-000002.json").write_text("{")
    (out / "receipts" / "shard-000003.json").unlink()
    (out / "shard-000003.tar").write_bytes(b"half")
    (out / "shard-000004.tar.123-0123abcd.tmp").write_bytes(b"left by a killed run")
    (out / "receipts" / "shard-000004.json.123-0123abcd.tmp").write_bytes(b"left by a killed run")
    (out / "manifest.json").unlink()
    assert make(tree, out).earlier_shards == 1
    assert forms.files_of(out) == content


def test_a_receipt_counts_for_its_plan_and_its_bytes(tmp_path):
    url = str(tmp_path)
    digest = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of hello
    rows = np.zeros(2, manifest.ROW)
    rows["label"] = [3, -1]
    receipt = Receipt(Shard("a-0.tar", 5, 2, digest), rows, (Reject("x.jpg", "empty file"),))
    storage.write(f"{url}/a-0.tar", b"hello")
    write_receipt(receipt, url, "plan")
    found = find_finished(url, "a-0.tar", "plan")
    assert found.is_earlier and found.shard == receipt.shard and found.rejects == receipt.rejects
    np.testing.assert_array_equal(found.rows, rows)
    assert find_finished(url, "a-0.tar", "other plan") is None
    assert find_finished(url, "a-1.tar", "plan") is None
    storage.write(f"{url}/a-0.tar", b"hallo")
    assert find_finished(url, "a-0.tar", "plan") is None


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"plan": "plan", "rows": "?"}'])
def test_a_damaged_receipt_is_none(tmp_path, text):
    storage.write(receipt_url(str(tmp_path), "a-0.tar"), text)
    assert find_finished(str(tmp_path), "a-0.tar", "plan") is None
