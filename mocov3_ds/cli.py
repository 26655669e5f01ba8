"""`mocov3`: what one does with a run besides training it."""

import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.export import Format
from mocov3_ds.encoders.export import export as export_encoder
from mocov3_ds.encoders.load import Which, build, read_weights
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.features import split_features
from mocov3_ds.evaluation.knn import knn_accuracy
from mocov3_ds.evaluation.look import look as draw_pictures
from mocov3_ds.evaluation.samples import labelled_splits, split_urls
from mocov3_ds.launch import Cluster, Kind, write_kit
from mocov3_ds.planning.command import plan

RunFolder = Annotated[Path, tyro.conf.Positional]


def knn(
    run: RunFolder,
    /,
    *,
    train: str = "",
    val: str = "",
    which: Which = "base",
    k: int = 200,
    temperature: float = 0.07,
    image_size: int = 0,
    heads: int = 0,
    batch: int = 256,
    threads: int = 4,
    out: Path | None = None,
) -> None:
    """Weighted k-NN accuracy of an encoder, with the whole training split as the bank.

    Works on all ranks: `torchrun --nproc-per-node 8 -m mocov3_ds.cli knn RUN`.

    Args:
        run: run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder).
        train: labelled training shards; empty = those of the run.
        val: labelled shards to classify; empty = the run's probe shards.
        which: base or momentum encoder.
        k: neighbours that vote.
        temperature: a neighbour votes with exp(similarity / temperature).
        image_size: side of a crop, pixels; 0 = as pretrained.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.
        batch: images per forward pass of a rank.
        threads: decode threads of a rank.
        out: folder of results.json; empty = RUN, or FILE-evaluation.
    """
    device = ranks.start()
    if min(k, batch) < 1 or temperature <= 0:
        raise ValueError(f"k {k}, batch {batch}, temperature {temperature} must be positive.")
    weights = read_weights(run, which, heads=heads)
    splits = labelled_splits(*split_urls(weights, train, val))
    size = image_size or weights.shape.image_size
    encoder = build(weights, image_size=size).to(device)
    (bank_ND, labels_N, _), (probes_PD, targets_P, _) = (
        split_features(encoder, split, image_size=size, batch=batch, threads=threads)
        for split in (splits.train, splits.val)
    )
    mine = slice(ranks.rank(), None, ranks.world_size())
    accuracy = knn_accuracy(
        bank_ND[mine], labels_N[mine], probes_PD, targets_P, k=k, temperature=temperature
    )
    if ranks.is_first():
        folder = out or results.folder_of(weights.path)
        entry = {
            "top1": accuracy,
            "encoder": weights.title,
            "k": k,
            "temperature": temperature,
            "image_size": size,
            "bank_images": len(labels_N),
            "val_images": len(targets_P),
            "step": weights.saved.step if weights.saved is not None else None,
            "train": splits.train.digest,
            "val": splits.val.digest,
        }
        results.record(folder, "knn", which, entry)
        print(
            f"k-NN (k = {k}, T = {temperature}) of {weights.title}: {accuracy:.2f} % of "
            f"{len(targets_P)} held-out images, bank of {len(labels_N)}"
        )
        print(f"{results.HEADER}\n{results.table_line(folder, which)}")


def export(
    run: RunFolder,
    /,
    *,
    to: Format = "timm",
    which: Which = "base",
    out: Path | None = None,
    image_size: int = 0,
    heads: int = 0,
) -> None:
    """Write an encoder for another program, with a model card, its features checked there.

    Args:
        run: run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder).
        to: program that shall load it: timm, DeiT, transformers (hf) or the published MoCo v3 code.
        which: base or momentum encoder.
        out: folder to make; empty = RUN-TO-WHICH beside the run.
        image_size: side of an image, pixels; 0 = as pretrained.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.
    """
    folder = out or run.parent / f"{run.resolve().name}-{to}-{which}"
    difference = export_encoder(run, folder, to=to, which=which, image_size=image_size, heads=heads)
    print(
        f"{folder}: same features within {difference:.1e}; {folder / 'README.md'} says how to load"
    )


def look(
    run: RunFolder,
    /,
    *,
    which: Which = "base",
    train: str = "",
    val: str = "",
    images: int = 8,
    neighbours: int = 8,
    bank: int = 10000,
    heads: int = 0,
    threads: int = 4,
    out: Path | None = None,
) -> None:
    """Draw what an encoder sees: attention maps, nearest neighbours, a histogram of similarities.

    Args:
        run: run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder).
        which: base or momentum encoder.
        train: labelled training shards; empty = those of the run.
        val: labelled held-out shards; empty = the run's probe shards.
        images: held-out images that are shown.
        neighbours: training images beside each.
        bank: training images that are searched, spread evenly over their set.
        heads: attention heads where the weights cannot tell; 0 = the paper's for their width.
        threads: decode threads.
        out: folder of the pictures; empty = RUN/look-WHICH, or FILE-evaluation/look-WHICH.
    """
    for path in draw_pictures(
        run,
        out or results.folder_of(run) / f"look-{which}",
        which=which,
        train=train,
        val=val,
        images=images,
        neighbours=neighbours,
        bank=bank,
        heads=heads,
        threads=threads,
    ):
        print(path)


def replay(
    run: RunFolder,
    step: Annotated[int, tyro.conf.Positional],
    /,
) -> None:
    """Run one step of a run again, exactly, and show each stage of it and the samples to blame.

    For a step that RUN/trouble/step-N.json tells of, or any other. It starts from the nearest
    checkpoint before the step and lives up to it: bit for bit on as many ranks as it had (CPU),
    e.g. `torchrun --nproc-per-node 8 -m mocov3_ds.cli replay RUN STEP`; else up to rounding.

    Args:
        run: run folder; its trouble/ gets the views of the samples as PNG.
        step: from 1, as metrics.jsonl counts.
    """
    from mocov3_ds.faults.replay import replay as run_again  # the engine takes a while

    for line in run_again(run, step):
        if ranks.is_first():
            print(line)


def views(
    shards: Annotated[str, tyro.conf.Positional],
    /,
    *,
    out: Path = Path("views.png"),
    rows: int = 8,
    size: int = 224,
    seed: int = 0,
    epoch: int = 0,
) -> None:
    """Draw a sheet of views as training sees them, beside the same draws by Pillow.

    Args:
        shards: folder or URL of a sharded set.
        out: PNG to write.
        rows: samples shown.
        size: side of a view, pixels.
        seed: of the run.
        epoch: pass over the data.
    """
    from mocov3_ds.data.views.contact_sheet import contact_sheet  # torchvision takes a while

    largest = contact_sheet(shards, out, rows=rows, size=size, seed=seed, epoch=epoch)
    print(f"{out}: ours differs from the same draws by Pillow by at most {largest} of 255")


def stability() -> None:
    """Study huge batches: grids of runs, their report, the replay of an event (see --help)."""


def launch(
    kind: Annotated[Kind, tyro.conf.Positional],
    train: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    cluster: Annotated[Cluster, tyro.conf.arg(name="")] = Cluster(),  # noqa: B008 (frozen)
    out: Path | None = None,
) -> None:
    """Write the files that start a run on a cluster.

        mocov3 launch slurm --nodes 4 --gpus 8 -- --recipe vit_l16 --data.shards s3://bucket/imagenet

    Args:
        kind: Slurm, plain Kubernetes, DeepSpeed's own launcher over ssh, torchrun or accelerate on
            each node, or the file that builds a container image.
        train: flags of train.py, after --
        cluster: the machines.
        out: folder to make; empty = launch-KIND.
    """
    folder = out or Path(f"launch-{kind}")
    for path in write_kit(kind, cluster, folder, train):
        print(path)


def main() -> int:
    """Entry point of the `mocov3` command."""
    try:
        try:
            return _main()
        finally:
            sys.stdout.flush()  # here, where it can be caught
    except BrokenPipeError:  # `| head` has read enough; a shell calls that 128 + SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141


def _main() -> int:
    if sys.argv[1:2] == ["stability"]:  # a command with commands of its own
        from mocov3_ds.stability import commands

        return commands.main(sys.argv[2:] or ["--help"])
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "knn": knn,
                "export": export,
                "look": look,
                "views": views,
                "replay": replay,
                "launch": launch,
                "plan": plan,
                "stability": stability,
            },
            prog="mocov3",
        )
    except ValueError as error:
        if ranks.is_first():
            print(f"mocov3: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # of one machine, maybe: each rank tells its own
        where = f"{error.filename}: {error.strerror}." if error.filename else f"{error}"
        print(f"mocov3: error: {where}", file=sys.stderr)
        return 2
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
