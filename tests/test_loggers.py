"""`--log` in real runs: trackers that fail or hang cost a run nothing, others get equal values."""

import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mocov3_ds.monitoring.metrics_file import read_rows
from mocov3_ds.monitoring.run_log import RunLog
from mocov3_ds.monitoring.sinks import grouped_numbers
from mocov3_ds.monitoring.trackers import sink_openers

ROOT = Path(__file__).parents[1]
SMALL = [
    *("--batch", "32", "--data.limit", "96", "--epochs", "2", "--warmup_epochs", "1"),
    *("--model.depth", "1", "--model.dim", "24", "--model.heads", "2", "--model.hidden", "16"),
    *("--model.out", "16", "--knn.probes", "32", "--knn.bank", "32", "--name", "mine"),
]
HANGING = """
import atexit, time

class Run:
    def log(self, values, step=None):
        time.sleep(600)
    def define_metric(self, *names, **options): pass
    def finish(self): pass

class config:
    update = staticmethod(lambda *values, **options: None)

def init(**options):
    atexit.register(time.sleep, 600)
    return Run()
"""
RAISING = "def init(**options): raise SystemExit('no key')"
MAIN = """
import sys
from mocov3_ds.monitoring import run_log
from mocov3_ds import train
run_log._CLOSE_S = 1.0
sys.exit(train.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "words"),
    [
        (HANGING, "--log wandb did not finish in time"),
        (RAISING, "--log wandb cannot be opened (SystemExit: no key); the run goes on"),
    ],
    ids=["hangs", "raises"],
)
def test_a_tracker_that_fails_or_hangs_costs_a_run_nothing(
    module: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "wandb.py").write_text(module)
    settings = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *SMALL, "--log", "wandb", "csv", "tensorboard"],
        cwd=tmp_path,
        env={**os.environ, **settings, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(words) == 1
    assert "Traceback" not in done.stderr
    assert "finished; checkpoint in" in done.stdout
    run = tmp_path / "runs/mine"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5, 6]
    assert len((run / "metrics.csv").read_text().splitlines()) == 8
    assert list((run / "tensorboard").iterdir())


Values = dict[tuple[int, str], float]


def wandb_values(run: Path) -> Values:
    from wandb.proto import wandb_internal_pb2

    values: Values = {}
    for path in run.glob("wandb/offline-run-*/*.wandb"):
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            if "step" in items:
                values |= {(items["step"], name): value for name, value in items.items()}
    return values


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format: blocks of 32 KiB, records in pieces."""
    position, pieces = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        piece = data[position + 7 : position + 7 + size]
        position += 7 + size
        pieces = piece if kind in (1, 2) else pieces + piece
        if kind in (1, 4):
            yield pieces


def mlflow_values(run: Path) -> Values:
    import mlflow

    client, run_id = mlflow.MlflowClient(), (run / "trackers/mlflow").read_text().strip()
    return {
        (point.step, name): point.value
        for name in client.get_run(run_id).data.metrics
        for point in client.get_metric_history(run_id, name)
    }


def trackio_values(run: Path) -> Values:
    (path,) = run.parent.glob("trackio/*.db")
    rows = sqlite3.connect(path).execute("select step, metrics from metrics").fetchall()
    return {(step, name): x for step, text in rows for name, x in json.loads(text).items()}


READERS = {"wandb": wandb_values, "mlflow": mlflow_values, "trackio": trackio_values}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inside trackers
@pytest.mark.parametrize("name", READERS)
def test_values_of_a_real_tracker_equal_the_log(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install mocov3-ds[loggers]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": {"batch": 8}, "deepspeed": {}}))
    for first, last in ((1, 4), (4, 6)):  # killed after step 4, the checkpoint was at step 3
        log = RunLog(
            run, steps_done=first - 1, total_steps=9, speaks=True, sinks=sink_openers([name])
        )
        for step in range(first, last + 1):
            log.log_step({"step": step, "loss": 0.1 * step, "lr": 1e-30, "applied": True})
        log.close(120.0)
    time.sleep(1)
    rows = read_rows(run / "metrics.jsonl")
    expected = {(r["step"], tag): x for r in rows for tag, x in grouped_numbers(r).items()}
    assert len(expected) == 18
    found = READERS[name](run)
    assert {key: found.get(key) for key in expected} == expected
