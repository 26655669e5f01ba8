"""The mirror tells complete checkpoints from others, and a fresh machine goes on from it."""

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mocov3_ds.checkpoints import mirror, run_folder
from mocov3_ds.checkpoints.checkpoint_writer import remove_checkpoint
from mocov3_ds.checkpoints.mirror import Mirror
from mocov3_ds.checkpoints.saver import Saver
from mocov3_ds.data import storage
from mocov3_ds.distributed import ranks
from tests import object_store
from tests.checkpoints.saved import WEIGHT, check_newest, save_step, steps_on_disk

SETTINGS: dict[str, Any] = {"config": {"batch": 8}, "deepspeed": {}}


def write(run: Path, step: int) -> Path:
    """A checkpoint and the metrics up to it."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step}) + "\n")
    return save_step(run, step, keep=9)


def complete(url: str) -> list[str]:
    names: list[str] = json.loads(storage.read(storage.join_url(url, "mirror.json")))["complete"]
    return names


def check(run: Path, step: int) -> None:
    check_newest(run, {step})
    assert (run / "checkpoints/latest").read_text().strip() == f"step-{step:08d}"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert step in [row["step"] for row in rows]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    run_folder.claim_folder(folder, SETTINGS, "data")
    return folder


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The run's folder on a fresh machine."""
    folder = tmp_path / "other"
    run_folder.claim_folder(folder, SETTINGS, "data")
    return folder


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "folder":
        yield str(tmp_path / "mirror")
    else:
        yield f"{request.getfixturevalue('s3')}/mirror-{tmp_path.name}"


def test_the_way_that_a_rewind_left_does_not_come_back(
    tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At step 4 it had seen 4 batches; rewound, it is at step 3 and has seen 9."""

    def save(step: int, position: int) -> Path:
        return save_step(run, step, keep=9, state={"position": position})

    url = str(tmp_path / "mirror")
    mirror.copy_checkpoint(url, run, save(4, 4), keep=2)
    remove_checkpoint(run / "checkpoints/step-00000004")
    save(3, 9)
    assert mirror.fetch_newer_checkpoint(url, run) is None
    assert "the run here is behind global batch 9 already" in caplog.text
    mirror.copy_checkpoint(url, run, save(5, 11), keep=2)
    remove_checkpoint(run / "checkpoints/step-00000005")
    assert mirror.fetch_newer_checkpoint(url, run) == run / "checkpoints/step-00000005"


def test_what_is_copied_comes_back_and_old_ones_go(url: str, run: Path, other: Path) -> None:
    assert not mirror.has_checkpoint(url)
    for step in (5, 10, 15, 20):
        mirror.copy_checkpoint(url, run, write(run, step), keep=2, keep_every=5 * 2)
    assert mirror.has_checkpoint(url)
    assert complete(url) == ["step-00000010", "step-00000015", "step-00000020"]
    assert not storage.list_files(storage.join_url(url, "checkpoints/step-00000005"))
    mirror.check_mirror(url, SETTINGS, "data")
    folder = mirror.fetch_newer_checkpoint(url, other)
    assert folder == other / "checkpoints/step-00000020"
    check(other, 20)
    assert (other / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert mirror.fetch_newer_checkpoint(url, other) is None  # as far as the mirror
    write(other, 25)
    assert mirror.fetch_newer_checkpoint(url, other) is None  # further
    check(other, 25)


def test_a_damaged_one_is_passed_over(
    url: str, run: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        mirror.copy_checkpoint(url, run, write(run, step), keep=2)
    storage.write(f"{url}/checkpoints/step-00000010/base-0.safetensors", b"something else")
    mirror.fetch_newer_checkpoint(url, other)
    check(other, 5)
    assert "passing over step 10 of the mirror" in caplog.text
    assert sorted(p.name for p in (other / "checkpoints").iterdir()) == ["latest", "step-00000005"]
    storage.remove_file(f"{url}/checkpoints/step-00000005/state.json")
    fresh = other.with_name("fresh")
    fresh.mkdir()
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints of the mirror .* is whole"):
        mirror.fetch_newer_checkpoint(url, fresh)


def test_a_damaged_checkpoint_here_is_healed(tmp_path: Path, run: Path) -> None:
    url = str(tmp_path / "mirror")
    folder = write(run, 5)
    mirror.copy_checkpoint(url, run, folder, keep=2)
    (folder / "base-0.safetensors").write_bytes(b"")
    mirror.fetch_newer_checkpoint(url, run)
    check(run, 5)


def test_the_mirror_of_another_run_is_refused(tmp_path: Path, run: Path) -> None:
    url = str(tmp_path / "mirror")
    settings = {"config": {"batch": 16}, "deepspeed": {}}
    mirror.check_mirror(url, settings, "data")  # there is none yet
    mirror.copy_checkpoint(url, run, write(run, 5), keep=2)
    with pytest.raises(ValueError, match=rf"{url} holds another run: batch is 8 there, 16 here"):
        mirror.check_mirror(url, settings, "data")
    storage.write(f"{url}/mirror.json", b"[]")
    with pytest.raises(ValueError, match=r"mirror\.json is damaged; give another --save\.mirror"):
        mirror.check_mirror(url, SETTINGS, "data")


HOSTILE = ["../../photos/2024", "step-1_0", " 7 ", "step--5", "step-00000005/../../x", "2024"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["complete", "partial"])
def test_names_of_a_foreign_index_reach_no_other_folder(
    tmp_path: Path, run: Path, name: str, kind: str
) -> None:
    photos = tmp_path / "photos/2024/1.raw"
    photos.parent.mkdir(parents=True)
    photos.write_text("mine")
    url = tmp_path / "mirror"
    url.mkdir()
    index = {"complete": [], "partial": []} | {kind: [name]}
    (url / "mirror.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"mirror\.json is damaged"):
        mirror.copy_checkpoint(str(url), run, write(run, 5), keep=1)
    assert photos.read_text() == "mine"


def test_only_files_of_a_checkpoint_are_removed(tmp_path: Path, run: Path) -> None:
    url = tmp_path / "mirror"
    mirror.copy_checkpoint(str(url), run, write(run, 5), keep=1)
    (url / "checkpoints/step-00000005/thesis.tex").write_text("mine")
    mirror.copy_checkpoint(str(url), run, write(run, 10), keep=1)
    left = [path.name for path in (url / "checkpoints/step-00000005").iterdir()]
    assert left == ["thesis.tex"]


def test_a_place_that_holds_something_else_is_refused(tmp_path: Path, run: Path) -> None:
    other_run = tmp_path / "runs/other"
    run_folder.claim_folder(other_run, {"config": {"batch": 16}, "deepspeed": {}}, "data")
    before = (other_run / "config.json").read_text()
    for call in (
        lambda: mirror.check_mirror(str(other_run), SETTINGS, "data"),
        lambda: mirror.copy_checkpoint(str(other_run), run, write(run, 5), keep=1),
    ):
        with pytest.raises(ValueError, match=r"holds config\.json and no mirror\.json"):
            call()
    assert (other_run / "config.json").read_text() == before
    in_the_way = tmp_path / "mirror/checkpoints/step-00000005"
    in_the_way.mkdir(parents=True)
    (in_the_way / "state.json").write_text("mine")
    with pytest.raises(ValueError, match="does not name it, so they are not ours"):
        mirror.copy_checkpoint(str(tmp_path / "mirror"), run, write(run, 5), keep=1)
    assert (in_the_way / "state.json").read_text() == "mine"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"complete": [5], "partial": []}', "{", "\xff"])
def test_an_index_of_a_stranger_is_damaged_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "mirror.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"mirror\.json is damaged"):
        mirror.check_mirror(str(tmp_path), SETTINGS, "data")


def test_an_end_at_any_moment_leaves_complete_ones_alone_in_the_index(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of the store is the last one of a run once."""
    folders = [write(run, step) for step in (5, 10)]
    calls = [getattr(storage, name) for name in ("open_write", "remove_file")]
    for last in range(1000):
        url, count = str(tmp_path / f"mirror-{last}"), 0
        mirror.copy_checkpoint(url, run, folders[0], keep=1)

        def ends(call: Any, allowed: int = last) -> Any:
            def wrapped(*arguments: Any) -> Any:
                nonlocal count
                count += 1
                if count > allowed:
                    raise ConnectionError("the run is no more")
                return call(*arguments)

            return wrapped

        ended = False
        with monkeypatch.context() as patch:
            for call in calls:
                patch.setattr(storage, call.__name__, ends(call))
            try:
                mirror.copy_checkpoint(url, run, folders[1], keep=1)
            except ConnectionError:
                ended = True
        fresh = tmp_path / f"fresh-{last}"
        fresh.mkdir()
        mirror.fetch_newer_checkpoint(url, fresh)
        check(fresh, 5 if complete(url) == ["step-00000005"] else 10)
        # the next run leaves nothing of it behind
        mirror.copy_checkpoint(url, run, folders[1], keep=1)
        assert complete(url) == ["step-00000010"]
        assert not list((Path(url) / "checkpoints/step-00000005").glob("*"))
        if not ended:
            break
    assert last > 8


def test_trouble_with_the_store_is_a_warning_and_the_next_save_a_new_try(
    tmp_path: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "mirror"
    blocked.write_text("a file where the folder should be")
    saver = Saver(run, keep=2, mirror=Mirror(str(blocked), run, keep=2))
    saver.save(5, {"base": [("w", WEIGHT + 5)]}, {}, background=True)
    saver.close()
    assert "step-00000005 was not copied to the mirror" in caplog.text
    assert steps_on_disk(run) == [5]
    blocked.unlink()
    saver.save(10, {"base": [("w", WEIGHT + 10)]}, {}, background=True)
    saver.close()
    assert complete(str(blocked)) == ["step-00000010"]


def test_a_store_that_is_gone_stops_no_training(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = f"http://127.0.0.1:{ranks.free_port()}"
    with object_store.environment(nowhere, patience_s=0.2, first_contact_s=0.2, connect_s=1):
        saver = Saver(run, keep=2, mirror=Mirror("s3://bucket/gone", run, keep=2))
        for step in (5, 10):
            saver.save(step, {"base": [("w", WEIGHT + step)]}, {}, background=True)
        saver.close()
        with pytest.raises(storage.StorageError, match="no progress for"):
            mirror.check_mirror("s3://bucket/gone", SETTINGS, "data")
    assert "step-00000010 was not copied to the mirror" in caplog.text
    assert steps_on_disk(run) == [5, 10]


def test_a_slow_store_gets_the_newest_and_what_it_reads_is_not_removed(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    opened, reached = threading.Event(), threading.Event()
    open_write = storage.open_write

    def slow(url: str) -> AbstractContextManager[storage.Writer]:
        reached.set()
        assert opened.wait(240)
        return open_write(url)

    monkeypatch.setattr(storage, "open_write", slow)
    url = str(tmp_path / "mirror")
    saver = Saver(run, keep=1, mirror=Mirror(url, run, keep=9))
    for step in (5, 10, 15):
        saver.save(step, {"base": [("w", WEIGHT + step)]}, {}, background=False)
        assert reached.wait(240)
    # 5 is on its way; 10 was to be next until 15 overtook it
    assert steps_on_disk(run) == [5, 10, 15]
    assert "step-00000010 is left out" in caplog.text
    opened.set()
    saver.close()
    assert complete(url) == ["step-00000005", "step-00000015"]
    saver.save(20, {"base": [("w", WEIGHT + 20)]}, {}, background=False)
    saver.close()
    assert steps_on_disk(run) == [20]
