"""The kinds of input, each a set of sound files, how it is damaged, and the entry points it meets.

`feed` returns "accepted" or "skipped" (bad samples were counted or listed), or raises; what may be
raised is judged by the harness.
"""

import argparse
import contextlib
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mocov3_ds.checkpoints import checkpoint, mirror, run_folder
from mocov3_ds.config.run_config import encoder_shape
from mocov3_ds.data.sample_order import Order
from mocov3_ds.data.storage.span import read_span
from mocov3_ds.data.views.spec import ViewSpec
from mocov3_ds.distributed.engine_config import compute_dtype, engine_config
from mocov3_ds.encoders.export import export_encoder
from mocov3_ds.encoders.foreign_names import to_transformers
from mocov3_ds.encoders.load import load_encoder, read_run_config
from mocov3_ds.encoders.networks import Tensors
from mocov3_ds.monitoring.metrics_file import drop_rows_after, read_rows
from mocov3_ds.optim.build import base_rate, build_optimizer
from mocov3_ds.recipes import parse
from mocov3_ds.training.schedule import scaled_rate
from tests.evaluation.runs import make_run
from tests.fuzz.data_kinds import DATA_KINDS
from tests.fuzz.kind import Files, Kind, Outcome, clear, files_of

# ---------------------------------------------------------------------------------------- settings


@cache
def settings() -> list[Files]:
    flags = {
        "recipe": "vit_b16",
        "batch": 64,
        "epochs": 3,
        "warmup_epochs": 1,
        "views.crop_min": 0.2,
        "views.image_size": 32,
        "model.dim": 48,
        "model.heads": 3,
        "model.depth": 2,
        "moco.temperature": 0.2,
        "moco.momentum_schedule": "cosine",
        "data.lanes": 8,
        "data.pool": 64,
        "knn.k": 20,
        "save.keep": 2,
        "seed": 3,
    }
    overrides = ["zero_optimization.stage=2", "optimizer.params.lr=1e-3", 'bf16={"enabled": true}']
    engine = {
        "optimizer": {"type": "Lamb", "params": {"lr": 5e-4, "betas": [0.9, 0.999], "eps": 1e-6}},
        "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False, "initial_scale_power": 8},
        "train_batch_size": "auto",
    }
    text = json.dumps({"flags": flags, "ds": overrides}).encode()
    return [{"command.json": text, "engine.json": json.dumps(engine).encode()}]


def read_settings(folder: Path) -> Outcome:
    """The command line and the DeepSpeed JSON, up to where a run would touch its folder."""
    try:
        command = json.loads((folder / "command.json").read_bytes())
        flags, overrides = dict(command["flags"]), list(command["ds"])
    except (ValueError, KeyError, TypeError, RecursionError):  # this file is the harness's own
        flags, overrides = {}, []
    arguments = [part for key, value in flags.items() for part in (f"--{key}", f"{value}")]
    arguments += [part for text in overrides for part in ("--ds", f"{text}")]
    arguments += ["--deepspeed_config", str(folder / "engine.json")]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(said):
        try:
            run = parse(arguments)
        except SystemExit as end:
            raise SystemExit(said.getvalue() or end.code) from None
    config = run.config
    engine = engine_config(run.engine, global_batch=config.batch, world_size=1)
    compute_dtype(engine)
    scaled_rate(base_rate(run.engine.get("optimizer")), config.batch)
    layer = torch.nn.Linear(3, 2)
    build_optimizer(run.engine.get("optimizer"), layer.named_parameters())
    views = config.views
    ViewSpec(
        crop_min=views.crop_min,
        crop_max=views.crop_max,
        blur_p=views.blur_p,
        solarise_p=views.solarise_p,
    )
    if config.batch <= 150:
        order = Order((100, 50), config.batch, config.seed, config.data.lanes, config.data.pool)
        next(order.pieces_for_rank(0, 0, 1))
    encoder_shape(config)
    return "accepted"


# ------------------------------------------------------------------------------------- run folders


@cache
def runs() -> list[Files]:
    with TemporaryDirectory() as folder:
        made = make_run(Path(folder) / "run", step=3)
        rows = [{"step": n, "loss": 1 / n, "lr": 1e-3} for n in range(1, 6)]
        (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [files_of(made)]


def seal_run(files: dict[str, bytes]) -> None:
    """Digests of the files in state.json, and its own."""
    name = next(n for n in files if n.endswith("state.json"))
    state = json.loads(files[name])
    folder = name.rpartition("/")[0]
    state["files"] = {
        n: hashlib.sha256(files[f"{folder}/{n}"]).hexdigest()
        for n in state["files"]
        if f"{folder}/{n}" in files
    }
    if "digest" in state:
        rest = {n: v for n, v in state.items() if n != "digest"}
        state["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    files[name] = json.dumps(state).encode()


def read_run_folder(folder: Path) -> Outcome:
    """Settings, newest checkpoint, encoder, export's source, metrics."""
    trouble: list[Exception] = []
    steps: list[Callable[[], Any]] = [
        lambda: read_run_config(folder),
        lambda: load_encoder(folder, "momentum"),
        lambda: load_encoder(folder / "checkpoints"),
        lambda: load_encoder(folder / "checkpoints/step-00000003"),
        lambda: _whole_checkpoint(folder),
        lambda: run_folder.claim_folder(folder, {"config": {"batch": 8}, "deepspeed": {}}, "data"),
    ]
    for step in steps:
        try:
            step()
        except (ValueError, OSError) as error:
            clear(error, folder)
            trouble.append(error)
    if len(trouble) > 1:  # the settings of `claim_folder` are always another run's
        raise trouble[0]
    return "accepted"


def _whole_checkpoint(folder: Path) -> None:
    found = checkpoint.find_newest(folder)
    if found is None:
        raise ValueError(f"{folder} holds no whole checkpoint")
    for group in ("base", "momentum", "optimizer", "extra"):
        found.read_group(group)


@cache
def mirrors() -> list[Files]:
    """A mirror of one checkpoint."""
    with TemporaryDirectory() as temporary:
        made = make_run(Path(temporary) / "run", step=3)
        newest = made / "checkpoints/step-00000003"
        mirror.copy_checkpoint(f"{temporary}/mirror", made, newest, keep=1)
        return [files_of(Path(temporary) / "mirror")]


def read_mirror(folder: Path) -> Outcome:
    """Continue from it on a fresh machine; nothing beside the new run changes."""
    config: dict[str, Any] = {}  # of the run that asks; the damaged one is the mirror's
    with contextlib.suppress(ValueError):
        config = json.loads((folder / "config.json").read_bytes())
    mirror.check_mirror(str(folder), config, "data")
    with TemporaryDirectory(dir=folder) as fresh:
        run = Path(fresh) / "run"
        run.mkdir()
        found = mirror.fetch_newer_checkpoint(str(folder), run)
        assert [path.name for path in Path(fresh).iterdir()] == ["run"]
    return "accepted" if found is not None else "skipped"


def answers() -> list[Files]:
    """Headers of answers from a store."""
    spans = [{"length": 10, "range": None}, {"length": "10", "range": "bytes 5-14/100"}]
    return [{"headers.json": json.dumps(span).encode()} for span in spans]


def read_answer(folder: Path) -> Outcome:
    """Which bytes it holds."""
    text = (folder / "headers.json").read_bytes().decode(errors="replace")
    try:
        tree = json.loads(text)
        length, span = tree["length"], tree["range"]
    except (ValueError, KeyError, TypeError, RecursionError):  # this file is the harness's own
        length, span = text, text
    found = read_span(f"{length}", None if span is None else f"{span}")
    assert 0 <= found.start <= found.end
    return "accepted"


@cache
def metrics() -> list[Files]:
    return [{"metrics.jsonl": runs()[0]["metrics.jsonl"]}]


def read_metrics(folder: Path) -> Outcome:
    path = folder / "metrics.jsonl"
    before = len(path.read_bytes().splitlines())
    rows = read_rows(path)
    drop_rows_after(path, 3)
    kept = read_rows(path)
    assert all(row["step"] <= 3 for row in kept)
    return "skipped" if len(rows) < before else "accepted"


# ----------------------------------------------------------------------------------------- weights


@cache
def weights() -> list[Files]:
    """Exported folders, the published layout, DINO's, shards, and DeepSpeed's own folders."""
    with TemporaryDirectory() as temporary:
        made = make_run(Path(temporary) / "run")
        found = []
        for program in ("timm", "hf"):
            out = Path(temporary) / program
            export_encoder(made, out, to=program)  # type: ignore[arg-type]
            found.append(files_of(out))
        vit = load_encoder(made).state_dict()
        file = io.BytesIO()
        prefixed = {f"module.base_encoder.{n}": t for n, t in vit.items()}
        torch.save({"epoch": 3, "arch": "vit_small", "state_dict": prefixed, "num_heads": 4}, file)
        found.append({"model.pth": file.getvalue()})
        file = io.BytesIO()
        torch.save({"module": {f"base.backbone.{n}": t for n, t in vit.items()}}, file)
        found.append(
            {"latest": b"global_step3", "global_step3/mp_rank_00_model_states.pt": file.getvalue()}
        )
        found += [_dino_file(vit), _shards(vit, found[1]["config.json"]), _universal_folder(vit)]
    return [{n: d for n, d in files.items() if not n.endswith(".md")} for files in found]


def _dino_file(vit: Tensors) -> Files:
    """A student and a teacher, with what programs save beside them."""
    file, options = io.BytesIO(), argparse.Namespace(arch="own", out=Path("x"))
    student = {f"module.backbone.{n}": t for n, t in vit.items()}
    teacher = {f"backbone.{n}": t for n, t in vit.items()}
    beside = {"args": options, "best": np.float64(1), "log": defaultdict(list), "num_heads": 4}
    torch.save({"student": student, "teacher": teacher, **beside}, file)
    return {"model.pth": file.getvalue()}


def _shards(vit: Tensors, config: bytes) -> Files:
    """Transformers' names in two files, with the index of both."""
    places, files = dict[str, str](), dict[str, bytes]()
    tensors = sorted(to_transformers(vit).items())
    for number, part in enumerate((tensors[::2], tensors[1::2])):
        name, file = f"pytorch_model-{number}.bin", io.BytesIO()
        torch.save({tensor: rows.clone() for tensor, rows in part}, file)
        files[name] = file.getvalue()
        places |= {tensor: name for tensor, _ in part}
    index = json.dumps({"weight_map": places}).encode()
    return {**files, "pytorch_model.bin.index.json": index, "config.json": config}


def _universal_folder(vit: Tensors) -> Files:
    """Masters by name, as ds_to_universal makes them."""
    files = {"latest_universal": b"u"}
    for name, tensor in vit.items():
        file = io.BytesIO()
        torch.save({"param": tensor}, file)
        files[f"u/zero/base.{name}/fp32.pt"] = file.getvalue()
    return files


def read_weights(folder: Path) -> Outcome:
    """By folder and, where there is one, by file."""
    trouble: list[Exception] = []
    paths = [folder, *(p for p in folder.iterdir() if p.suffix in (".pth", ".safetensors"))]
    for path in paths:
        try:
            told = path.suffix == ".pth" or (path == folder and (folder / "config.json").exists())
            load_encoder(path, heads=0 if told else 4)  # the others do not tell their heads
        except (ValueError, OSError) as error:
            clear(error, folder)
            trouble.append(error)
    if trouble:
        raise trouble[0]
    return "accepted"


KINDS = [
    *DATA_KINDS,
    Kind("settings", 2, settings, read_settings, names_files=False),
    Kind("run folder", 2, runs, read_run_folder, seal_run),
    Kind("metrics", 1, metrics, read_metrics),
    Kind("mirror", 1, mirrors, read_mirror, seal_run),
    Kind("answer of a store", 1, answers, read_answer, names_files=False),
    Kind("weights", 2, weights, read_weights),
]
