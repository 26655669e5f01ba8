"""A study as files: runs whose logs are written without any training."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mocov3_ds.model.layer_groups import group_names
from mocov3_ds.monitoring.signal_file import SIGNALS, SignalFile
from mocov3_ds.recipes import parse
from mocov3_ds.stability.cells import Outcome
from mocov3_ds.stability.grid import lay_out, tomllib
from mocov3_ds.stability.grid_folder import prepare_folder

GRID = """
title = "Two optimizers & a twin"
about = "What is <asked>."
twins = ["AdamW"]
seeds = 2
[base]
"model.depth" = 3
epochs = 30
[[arms]]
name = "AdamW"
axes = { lr = [1e-3, 2e-3] }
[[arms]]
name = "LAMB"
optimizer = "Lamb"
"""
STEPS, EVERY = 480, 10  # drawn images: 16 steps an epoch


def write_run(
    folder: Path, flags: list[str], seed: int, *, spikes: list[int], trained: bool
) -> None:
    """A run folder with a falling loss, rising accuracy, and spikes of gradient, RMS and loss."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    tree = {**parse(flags).as_json(), "data_digest": "", "version": "0"}
    (folder / "config.json").write_text(json.dumps(tree))
    groups = group_names(3)
    t = np.arange(1, STEPS + 1)
    size = 1 + sum((12 * np.exp(-abs(t - peak) / 3) for peak in spikes), np.zeros(STEPS))
    noise = 1 + 0.002 * random.standard_normal(STEPS)
    loss = (3 + 3 * np.exp(-t / 100)) * noise * (1 + 0.02 * (size - 1))
    knn = 45 - 30 * np.exp(-t / 120) + 0.1 * random.standard_normal(STEPS)
    for peak in spikes[:1]:
        knn[(t > peak) & (t <= peak + 60)] -= 15
    rows: list[dict[str, Any]] = [{"step": 0, "knn_full": 12.0, "knn_chance": 10.0}]
    file = SignalFile(folder, groups, steps_done=0)
    for index, step in enumerate(t.tolist()):
        row = {
            "step": step,
            "epoch": step / 16,
            "loss": loss[index],
            "lr": 1e-3,
            "chance_loss": 4.4,
        }
        evaluation = {"knn": float(knn[index])} if step % EVERY == 0 else {}
        rows.append({**row, **evaluation})
        values = {"step": step, "lr": 1e-3, "loss": loss[index], **evaluation}
        if step % (4 * EVERY) == 0:
            values |= {"sharpness": 5e3 + step, "sharpness_limit": 3.8e4, "noise_scale": 300.0}
        for group in groups:
            if trained or group != "patch_embed":
                tremble = float(np.exp(0.05 * random.standard_normal()))
                found = dict.fromkeys(SIGNALS, tremble)
                found["grad_linf"] = found["grad_l2"] = 1e-3 * tremble * size[index]
                found["rms"] = found["rms_before"] = 0.2 * tremble * size[index]
                values |= {f"{group}/{name}": value for name, value in found.items()}
        file.write_row(values)
    file.close()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)


def write_study_runs(folder: Path) -> None:
    """A grid's folder: spikes in AdamW's trained runs alone, one cell failed before it began."""
    grid = lay_out(tomllib.loads(GRID), "mine", "tiny")
    prepare_folder(folder, grid, launcher="python", extra=[])
    for cell in grid.cells[:-1]:
        spikes = [200 + 3 * cell.seed, 330] if "AdamW" in cell.label and not cell.frozen else []
        flags, trained = cell.flags(), not cell.frozen
        write_run(folder / "cells" / cell.name, flags, cell.seed, spikes=spikes, trained=trained)
        Outcome(cell.name, "done", 0, 1.0, "").write(folder)
    Outcome(grid.cells[-1].name, "failed", 1, 1.0, "out of memory").write(folder)
