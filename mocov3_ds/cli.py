"""`mocov3`: what one does with a run besides training it."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data.stream import evaluation_batches
from mocov3_ds.data.views import ViewSpec, normalise
from mocov3_ds.distributed import ranks
from mocov3_ds.encoder import Which, load_encoder, read_run
from mocov3_ds.evaluation.features import extract, join
from mocov3_ds.evaluation.knn import knn_accuracy
from mocov3_ds.export import export as export_encoder

RunFolder = Annotated[Path, tyro.conf.Positional]


def knn(
    run: RunFolder,
    /,
    *,
    shards: str = "",
    probe_shards: str = "",
    which: Which = "base",
    k: int = 200,
    temperature: float = 0.07,
    batch: int = 256,
    threads: int = 4,
) -> None:
    """Weighted k-NN accuracy of a run's encoder, with the whole training split as the bank.

    Works on all ranks: `torchrun --nproc-per-node 8 -m mocov3_ds.cli knn RUN`.

    Args:
        run: run folder.
        shards: training shards; empty = those of the run.
        probe_shards: labelled shards to classify; empty = those of the run.
        which: base or momentum encoder.
        k: neighbours that vote.
        temperature: a neighbour votes with exp(similarity / temperature).
        batch: images per forward pass of a rank.
        threads: decode threads of a rank.
    """
    device = ranks.start()
    config = read_run(run)
    encoder = load_encoder(run, which).to(device)
    splits = [shards or config.data.shards, probe_shards or config.data.probe_shards]
    if not config.data.shards and not shards:
        folder = config.runs / "sample-images"
        splits = [str(folder / "train"), str(folder / "test")]
    if not all(splits):
        raise ValueError("the run names no labelled probe shards; give --probe_shards FOLDER.")
    spec, size = ViewSpec(), config.views.image_size

    def prepare(crops_BCHW: torch.Tensor) -> torch.Tensor:
        return normalise(crops_BCHW.to(device), spec.mean, spec.std, torch.float32)

    joined = []
    for url in splits:
        batches = evaluation_batches(
            manifests.load(url),
            image_size=size,
            resize=round(size * 256 / 224),
            batch=batch,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            threads=threads,
        )
        joined.append(join(*extract(encoder, batches, prepare)))
    (bank_ND, labels_N, _), (probes_PD, targets_P, _) = joined
    mine = slice(ranks.rank(), None, ranks.world_size())
    accuracy = knn_accuracy(
        bank_ND[mine], labels_N[mine], probes_PD, targets_P, k=k, temperature=temperature
    )
    if ranks.is_first():
        print(
            f"k-NN (k = {k}, T = {temperature}) of the {which} encoder: {accuracy:.2f} % of "
            f"{len(targets_P)} probes, bank of {len(labels_N)}"
        )
    ranks.stop()


def export(run: RunFolder, /, *, out: Path | None = None, which: Which = "base") -> None:
    """Write the encoder for timm (safetensors, sizes, a README), features checked.

    Args:
        run: run folder.
        out: folder to make; empty = RUN/export-timm.
        which: base or momentum encoder.
    """
    folder = out or run / f"export-timm-{which}"
    difference = export_encoder(run, folder, which=which)
    print(
        f"{folder}: same features within {difference:.1e}; {folder / 'README.md'} says how to load"
    )


def main() -> int:
    """Entry point of the `mocov3` command."""
    try:
        tyro.extras.subcommand_cli_from_dict({"knn": knn, "export": export}, prog="mocov3")
    except ValueError as error:
        if ranks.is_first():
            print(f"mocov3: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
