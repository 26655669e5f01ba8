"""Doctor: right on a sound machine, and each of its checks fails when what it checks is broken."""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from mocov3_ds import doctor
from mocov3_ds.checks import exact, machine, network, resume, stores
from mocov3_ds.checks.finding import Finding, judged, merged
from mocov3_ds.config import RECIPES
from mocov3_ds.data import storage
from mocov3_ds.data.views import decode
from mocov3_ds.distributed import ranks
from mocov3_ds.model.momentum_encoder import MomentumEncoder
from mocov3_ds.optim.lamb import Lamb
from mocov3_ds.optim.sharded import ShardedOptimizer
from mocov3_ds.training import run
from tests.data.sets import make_set, picture
from tests.ranks_pool import run_ranks

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


# ---------------------------------------------------------------------- what runs on several ranks


@contextlib.contextmanager
def broken(place: Any, name: str, made: Callable[[Any], Any]) -> Iterator[None]:
    """Exchange a piece of the product by one that is made from it."""
    with mock.patch.object(place, name, made(getattr(place, name))):
        yield


def other_momentum(begin: Any) -> Any:
    return lambda self, momentum: begin(self, momentum * 0.99)


def nudged_on_rank_1(finish: Any) -> Any:
    def nudged(self: MomentumEncoder) -> None:
        finish(self)
        if ranks.rank() == 1:
            list(self._master.values())[-1].view(-1)[0] += 1e-6  # a large weight: no loss shows it

    return nudged


def noisy_step(step: Any) -> Any:
    return lambda engine, encoder, x1, x2, **options: step(
        engine, encoder, x1 + 1e-3 * (time.perf_counter() % 1), x2, **options
    )


def refusing_stage_2(start: Any) -> Any:
    def start_engine(model: Any, optimizer: Any, config: Any) -> Any:
        if config["zero_optimization"]["stage"] == 2:
            raise RuntimeError("no stage 2 here")
        return start(model, optimizer, config)

    return start_engine


def from_the_start(stream: Any) -> Any:
    return lambda *args, **options: stream(*args, **options | {"position": 0})


def steps() -> list[Finding]:
    with mock.patch.object(exact, "_STAGES", (1, 3)):
        return exact.check_steps(CPU)


def all_steps() -> list[Finding]:
    return exact.check_steps(CPU)


def batch_norm() -> list[Finding]:
    return [exact.check_batch_norm(CPU)]


def gather() -> list[Finding]:
    return [exact.check_gather(CPU)]


def repetition() -> list[Finding]:
    return [exact.check_determinism(CPU)]


def collectives() -> list[Finding]:
    with mock.patch.object(network, "_SIZES_MB", (1,)):
        return network.check_collectives(CPU)


def clock() -> list[Finding]:
    return [network.check_clock()]


Broken = tuple[str, Any, str, Callable[[Any], Any], Callable[[], list[Finding]], set[str]]
LOSS, GRADIENT = "loss, N ranks = 1 rank", "gradients, N ranks = 1 rank"
LAMB, FORMULA = "LAMB step = unsharded LAMB", "momentum encoder = its formula"
EQUAL = "momentum encoder, bit-equal ranks"

# what is broken, and which findings must fail of it
BREAKAGES: list[Broken] = [
    ("own keys only", ranks, "all_gather_cat", lambda f: lambda x: torch.cat([x, x]), gather,
     {"key gather"}),
    ("keys in another order", ranks, "all_gather_cat", lambda f: lambda x: f(x).flip(0), gather,
     {"key gather"}),
    ("keys in another order, step", ranks, "all_gather_cat",
     lambda f: lambda x: f(x) if x.dim() != 2 else f(x).roll(4, 0), steps, {LOSS, GRADIENT}),
    ("local batch norm", ranks, "all_gather_stack", lambda f: lambda x: x[None], batch_norm,
     {"batch norm over ranks"}),
    ("local batch norm, step", ranks, "all_gather_stack", lambda f: lambda x: x[None], steps,
     {LOSS, GRADIENT, EQUAL}),
    ("local gradient of the batch norm", ranks, "all_reduce_sum", lambda f: lambda x, group=None: x,
     batch_norm, {"batch norm over ranks"}),
    ("another loss", exact.train_step.__globals__["contrastive_loss"].__globals__["F"],
     "cross_entropy", lambda f: lambda x, y: 1.001 * f(x, y), steps, {LOSS, GRADIENT}),
    ("flat LAMB", exact, "Lamb", lambda f: lambda *a, **o: f(*a, **o, flat=True), steps, {LAMB}),
    ("norms of this rank's part", ShardedOptimizer, "_summed", lambda f: lambda s, p, sums: sums,
     steps, {LAMB}),
    ("another momentum", MomentumEncoder, "begin", other_momentum, steps,
     {FORMULA, LOSS, GRADIENT}),
    ("momentum encoders drift apart", MomentumEncoder, "finish", nudged_on_rank_1, steps, {EQUAL}),
    ("a step that draws", exact, "train_step", noisy_step, repetition, {"one step twice"}),
    ("a stage that does not run", exact, "start_engine", refusing_stage_2, all_steps,
     {"training step"}),
    ("a sum that loses ranks", ranks, "all_reduce_sum", lambda f: lambda x, group=None: x,
     collectives, {"all_reduce"}),
    ("a scatter of the first part", ranks, "reduce_scatter_sum",
     lambda f: lambda x: x[: len(x) // 2], collectives, {"reduce_scatter"}),
    ("a gather of the own part", ranks, "all_gather_flat", lambda f: lambda x: torch.cat([x, x]),
     collectives, {"all_gather"}),
    ("clocks apart", time, "time", lambda f: lambda: f() - 5 * ranks.rank(), clock,
     {"clocks of the ranks"}),
]  # fmt: skip
RESUMES: list[tuple[str, Any, str, Callable[[Any], Any], set[str]]] = [
    ("nothing saved", run.Run, "save", lambda f: lambda self, last: None,
     {"checkpoint: save and load"}),
    ("momentum encoder forgotten", MomentumEncoder, "load_full_state", lambda f: lambda s, t: None,
     {"resume, same stage", "resume, ZeRO-1 to ZeRO-3"}),
    ("samples from the start", run, "Stream", from_the_start,
     {"resume, same stage", "resume, ZeRO-1 to ZeRO-3"}),
    ("moments forgotten", Lamb, "load_full_state", lambda f: lambda *_: None,
     {"resume, same stage", "resume, ZeRO-1 to ZeRO-3"}),
]  # fmt: skip


def breakages(folder: str) -> dict[str, list[Finding]]:
    """Findings of each breakage, and of a whole sound examination."""
    found = {}
    for title, place, name, made, check, _ in BREAKAGES:
        with broken(place, name, made):
            found[title] = check()
    for title, place, name, made, _ in RESUMES:
        with broken(place, name, made):
            found[title] = resume.check_resume(CPU, Path(folder) / title)
    own = Path(folder) / f"rank-{ranks.rank()}"
    own.mkdir()
    found["folder not shared"] = [machine.check_shared(own)]
    return found


def examination(folder: str) -> bool:
    with mock.patch.object(network, "_SIZES_MB", (1, 16)):
        runs = Path(folder) / "runs"
        return doctor.doctor(doctor.Options(runs=runs, json=Path(folder) / "out.json"))


def failures(findings: list[Finding]) -> set[str]:
    return {f.name for f in findings if f.status == "fail"}


def test_what_is_broken_fails_and_nothing_else(tmp_path: Path) -> None:
    for title, *_ in RESUMES:
        (tmp_path / title).mkdir()
    first, second = run_ranks(2, breakages, str(tmp_path), timeout=500)
    wanted = {title: names for title, *_, names in BREAKAGES} | {t: n for t, *_, n in RESUMES}
    for title, names in wanted.items():
        if names == {"checkpoint: save and load"}:
            assert failures(first[title]) >= names, (title, first[title])
        else:
            assert failures(first[title]) == names, (title, first[title])
        assert all(f.remedy for f in first[title] if f.status == "fail")
    flat = next(f for f in first["flat LAMB"] if f.name == LAMB)
    assert "ZeRO-1" in flat.measured
    refused = next(f for f in first["a stage that does not run"] if f.name == "training step")
    assert refused.measured == "ZeRO-2: RuntimeError: no stage 2 here"
    still = next(f for f in first["a stage that does not run"] if f.name == LOSS)
    assert {*still.numbers} == {"ZeRO-0", "ZeRO-1", "ZeRO-3"}
    assert not failures(first["folder not shared"])
    assert failures(second["folder not shared"]) == {"run folder: shared"}


def test_a_sound_machine_passes_and_leaves_nothing(tmp_path: Path) -> None:
    assert run_ranks(2, examination, str(tmp_path)) == [True, True]
    tree = json.loads((tmp_path / "out.json").read_text())
    assert tree["good"] is True
    assert len(tree["hosts"]) == 2
    by_name = {f["name"]: f for f in tree["findings"]}
    assert {f["status"] for f in tree["findings"]} <= {"pass", "note", "skip"}
    assert {LOSS, GRADIENT, LAMB, FORMULA, EQUAL, "resume, ZeRO-1 to ZeRO-3"} <= {*by_name}
    assert {*by_name[LAMB]["numbers"]} == {f"ZeRO-{stage}" for stage in range(4)}
    assert by_name["all_reduce"]["numbers"]["1 MB, GB/s"] > 0
    assert list((tmp_path / "runs").iterdir()) == []


# ------------------------------------------------------------------------------------ on one rank


def test_versions_that_differ_are_named_with_their_ranks() -> None:
    same = {"torch": "2.14.1", "python": "3.11"}
    assert machine.check_versions([same, same]).status == "pass"
    found = machine.check_versions([same, {**same, "torch": "2.14.0"}, same])
    assert found.status == "fail"
    assert found.measured == "torch is 2.14.1 on ranks 0, 2; 2.14.0 on rank 1"
    assert {"torch", "deepspeed", "python", "mocov3-ds"} <= {*machine.versions()}


def test_limits() -> None:
    files, shared = machine.check_limits(files=256, shared=64 << 20)
    assert (files.status, shared.status) == ("fail", "note")
    assert "ulimit -n" in files.remedy
    assert [f.status for f in machine.check_limits(files=1024, shared=8 << 30)] == ["note", "pass"]
    assert [f.status for f in machine.check_limits(files=2**20, shared=8 << 30)] == ["pass"] * 2


@pytest.mark.parametrize(
    ("free", "errors", "major", "status", "words"),
    [
        (79, "0", 9, "pass", ""),
        (79, "3", 9, "fail", "memory is failing"),
        (40, "0", 9, "note", "another process"),
        (79, "[N/A]", 7, "note", "fp16"),
    ],
)
def test_cards(
    monkeypatch: pytest.MonkeyPatch, free: int, errors: str, major: int, status: str, words: str
) -> None:
    card = SimpleNamespace(name="H100", major=major, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free << 30, 80 << 30))
    monkeypatch.setattr(machine, "_nvidia_smi", lambda query: errors)
    found = machine.check_accelerator(torch.device("cuda", 0))
    assert found.status == status
    assert words in found.remedy
    assert machine.check_accelerator(CPU).status == "note"


def test_a_slower_decoder_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "backend", lambda: "pillow")
    monkeypatch.setattr(decode, "about", lambda: "pillow; not native: no compiler")
    monkeypatch.setattr(machine.native, "ready", lambda: False)
    decoder, kernels = machine.check_fast_paths(CPU)
    assert (decoder.status, kernels.status) == ("note", "note")
    assert "no compiler" in decoder.measured
    assert "compiler" in kernels.remedy


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RECIPES["vit_l16"].config
    # 302 M in the backbone, 23 M in the heads; the published ViT-L checkpoint is of this order
    assert 4.5e9 < machine.checkpoint_bytes(config) < 5.5e9
    assert machine.check_disk_space(tmp_path, config, free=10**12).status == "pass"
    full = machine.check_disk_space(tmp_path, config, free=10**10)
    assert full.status == "fail"
    assert "10.0 GB free" in full.measured
    monkeypatch.setattr(machine, "_DISK_BYTES", 1 << 20)
    monkeypatch.setattr(os, "fsync", lambda file: time.sleep(0.1))
    slow = machine.check_disk_speed(tmp_path)
    assert slow.status == "note"
    assert slow.numbers["MB/s"] < 20
    assert list(tmp_path.iterdir()) == []


def test_rename_that_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.check_rename(tmp_path).status == "pass"
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()

    def copied(self: Path, target: Path) -> Path:
        if self.is_dir():
            return Path(shutil.copytree(self, target))
        return Path(shutil.copyfile(self, target))  # into the same file, before readers' eyes

    monkeypatch.setattr(Path, "replace", copied)
    found = machine.check_rename(tmp_path)
    assert found.status == "fail"
    assert "POSIX" in found.remedy


@pytest.mark.parametrize("refuses", [False, True])
def test_locks_that_do_not_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    assert machine.check_lock(tmp_path).status == "pass"

    def flock(file: Any, kind: int) -> None:
        if refuses:
            raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    found = machine.check_lock(tmp_path)
    assert found.status == "fail"
    assert ("not implemented" if refuses else "two holders") in found.measured


def test_object_store(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [sound] = stores.check_store(f"{s3}/scratch", size=10_000)
    assert sound.status == "pass", sound
    assert list(storage.entries(f"{s3}/scratch")) == []
    [absent] = stores.check_store("s3://no-such-bucket/scratch", size=10)
    assert absent.status == "fail"
    assert "no bucket" in absent.measured
    assert stores.check_store("")[0].status == "skip"
    read = storage.read

    def damaged(url: str, *span: int) -> bytes:
        data = bytearray(read(url, *span))
        data[-1] ^= 1
        return bytes(data)

    monkeypatch.setattr(storage, "read", damaged)
    [spoilt] = stores.check_store(f"{s3}/scratch", size=10_000)
    assert spoilt.status == "fail"
    assert "differ" in spoilt.measured
    monkeypatch.setattr(
        storage, "read", lambda url, *span: read(url)[: span[1]] if span else read(url)
    )
    [ranges] = stores.check_store(f"{s3}/scratch", size=10_000)
    assert "bytes 5000 to 6000 differ" in ranges.measured
    monkeypatch.setattr(storage, "read", read)
    monkeypatch.setattr(storage, "entries", lambda url: iter(()))
    assert "the listing says None" in stores.check_store(f"{s3}/scratch", size=10)[0].measured
    monkeypatch.setattr(storage, "remove", lambda url: None)
    monkeypatch.setattr(stores, "_store_trouble", lambda *_: "")
    assert "after it was deleted" in stores.check_store(f"{s3}/scratch", size=10)[0].measured


def test_shards(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    made = make_set(url, [6, 5])
    reading, decoding = stores.check_shards(url)
    assert (reading.status, decoding.status) == ("pass", "pass")
    assert decoding.numbers["images/s"] > 0
    assert stores.check_shards("")[0].status == "skip"
    [nothing] = stores.check_shards(str(tmp_path))
    assert nothing.status == "fail"
    assert "manifest.json" in nothing.measured
    tar = tmp_path / "set" / made.shards[0].name
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    [spoilt] = stores.check_shards(url)
    assert spoilt.status == "fail"
    assert "not those of the manifest" in spoilt.measured
    tar.unlink()
    assert stores.check_shards(url)[0].status == "fail"
    make_set(url, [4], image=cut_picture)
    reading, decoding = stores.check_shards(url)
    assert (reading.status, decoding.status) == ("pass", "fail")
    assert "1 of 4 images are unreadable" in decoding.measured


def cut_picture(number: int) -> bytes:
    data: bytes = picture(number)
    return data[:-40] if number == 2 else data


# ------------------------------------------------------------------------------- merge and table


def test_a_failing_rank_is_named_and_the_worst_wins() -> None:
    good = Finding("disk", "pass", "100 MB/s")
    bad = Finding("disk", "fail", "read-only", remedy="mount it")
    [found] = merged([[good], [bad], [good], [bad]], ["a", "b", "c", "d"])
    assert found.status == "fail"
    assert found.measured == "rank 1 on b and 1 more (3): read-only"
    assert found.remedy == "mount it"
    assert merged([[good], [good]], ["a", "b"]) == [good]
    # a rank whose check raised says so beside what the others found
    alone = Finding("run folder", "fail", "OSError: gone")
    assert [f.name for f in merged([[good], [alone]], ["a", "b"])] == ["disk", "run folder"]


def test_what_is_not_a_number_fails() -> None:
    assert judged("x", {"a": 1e-7, "b": float("nan")}, 1e-5, "mend").status == "fail"
    assert judged("x", {"a": 1e-7}, 1e-5, "mend") == Finding(
        "x", "pass", "a 1.0e-07", "<= 1e-05", "", {"a": 1e-7}
    )


def test_a_check_that_raises_does_not_stop_the_others() -> None:
    def raises() -> list[Finding]:
        raise RuntimeError("no\n such  thing")

    fine = Finding("fine", "pass", "1", "2")
    found = doctor.examine([("first", raises), ("second", lambda: [fine])], ["a"])
    assert [f.status for f in found] == ["fail", "pass"]
    assert found[0].measured == "RuntimeError: no such thing"
    text = doctor.table(found)
    assert "FAIL first: see the error" in text
    assert "2 checks, 1 failed" in text


def test_what_was_found_is_told_when_a_rank_answers_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fine = Finding("fine", "pass", "1", "2")

    def leaves() -> list[Finding]:
        def lost(own: object) -> list[object]:
            raise RuntimeError("[gloo] Timed out")

        monkeypatch.setattr(doctor.ranks, "gather_objects", lost)
        return []

    todo = [("first", lambda: [fine]), ("second", leaves), ("third", lambda: [fine])]
    found = doctor.examine(todo, ["a"])
    assert [(f.name, f.status) for f in found] == [("fine", "pass"), ("second: ranks", "fail")]
    assert "[gloo] Timed out" in doctor.table(found)


def test_a_folder_that_is_not_shared_is_not_resumed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unshared = Finding("run folder: shared", "fail", "FileNotFoundError")
    monkeypatch.setattr(resume, "check_shared", lambda folder: unshared)
    (found,) = resume.check_resume(torch.device("cpu"), tmp_path)
    assert (found.status, found.measured) == (
        "skip",
        "not tried: a rank does not see the run folder",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "vit_x"], "no recipe 'vit_x'"),
        (["--runs", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    ],
)
def test_bad_options(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments, "--local_rank=0"])
    monkeypatch.setattr(ranks, "start", lambda timeout_s: CPU)
    assert doctor.main() == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_ends_with_an_error_when_something_fails(
    tmp_path: Path, free_port: int
) -> None:
    bin_folder = Path(sys.executable).parent
    command = [
        *(
            str(bin_folder / "deepspeed"),
            "--num_accelerators",
            "2",
            "--master_port",
            str(free_port),
        ),
        *(str(ROOT / "mocov3_ds/doctor.py"), "--runs", "runs", "--shards", "nowhere"),
    ]
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, **own, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "FAIL shards: check the URL" in done.stdout
    assert "1 failed" in done.stdout
    assert "[10/10] shards" in done.stderr + done.stdout
