"""The command `mocov3`: everything one does with a run besides training it."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import tyro

from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.export import export_encoder
from mocov3_ds.encoders.foreign_names import EncoderRole, Format
from mocov3_ds.encoders.load import Weights, build_encoder, read_weights
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.features import split_features
from mocov3_ds.evaluation.knn import knn_accuracy
from mocov3_ds.evaluation.labelled_images import Splits, choose_split_urls, open_splits
from mocov3_ds.evaluation.pictures import LookOptions, draw_pictures
from mocov3_ds.launch.kit import Kind, LaunchSettings, write_kit
from mocov3_ds.planning.command import plan

RunFolder = Annotated[Path, tyro.conf.Positional]


# ------------------------------------------------------------------------------- a trained encoder


def evaluate_knn(
    run: RunFolder,
    /,
    *,
    train: str = "",
    val: str = "",
    which: EncoderRole = "base",
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
        k: number of neighbours that vote.
        temperature: a neighbour votes with exp(similarity / temperature).
        image_size: side of a crop, pixels; 0 = as pretrained.
        heads: attention heads, if the weights cannot tell; 0 = the paper's for their width.
        batch: images per forward pass of a rank.
        threads: decode threads of a rank.
        out: folder of results.json; empty = RUN, or FILE-evaluation.
    """
    device = ranks.start()
    if min(k, batch) < 1 or temperature <= 0:
        raise ValueError(f"k {k}, batch {batch}, temperature {temperature} must be positive.")
    weights = read_weights(run, which, heads=heads)
    splits = open_splits(*choose_split_urls(weights, train, val))
    size = image_size or weights.shape.image_size
    encoder = build_encoder(weights, image_size=size).to(device)
    (bank_ND, labels_N, _), (probes_PD, targets_P, _) = (
        split_features(encoder, split, image_size=size, batch=batch, threads=threads)
        for split in (splits.train, splits.val)
    )
    first, step = ranks.rank(), ranks.world_size()
    bank = bank_ND[first::step], labels_N[first::step]
    accuracy = knn_accuracy(*bank, probes_PD, targets_P, k=k, temperature=temperature)
    entry = {"top1": accuracy, "k": k, "temperature": temperature, "image_size": size}
    entry |= {"bank_images": len(labels_N), "val_images": len(targets_P)}
    if ranks.is_first():
        folder = out or results.results_folder(weights.path)
        _report_knn(folder, which, entry | _describe_sources(weights, splits))


def _describe_sources(weights: Weights, splits: Splits) -> dict[str, Any]:
    """The encoder and the sets that an accuracy belongs to, as results.json names them."""
    return {
        "encoder": weights.title,
        "step": weights.saved.step if weights.saved is not None else None,
        "train": splits.train.digest,
        "val": splits.val.digest,
    }


def _report_knn(folder: Path, which: EncoderRole, entry: dict[str, Any]) -> None:
    """Write the entry to results.json and print it."""
    results.record_result(folder, "knn", which, entry)
    print(
        f"k-NN (k = {entry['k']}, T = {entry['temperature']}) of {entry['encoder']}: "
        f"{entry['top1']:.2f} % of {entry['val_images']} held-out images, "
        f"bank of {entry['bank_images']}"
    )
    print(results.format_table(folder, which))


def export_weights(
    run: RunFolder,
    /,
    *,
    to: Format = "timm",
    which: EncoderRole = "base",
    out: Path | None = None,
    image_size: int = 0,
    heads: int = 0,
) -> None:
    """Write an encoder for another program, with a model card, and check its features there.

    Args:
        run: run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder).
        to: program that will load it: timm, DeiT, transformers (hf) or the published MoCo v3 code.
        which: base or momentum encoder.
        out: folder to make; empty = RUN-TO-WHICH beside the run.
        image_size: side of an image, pixels; 0 = as pretrained.
        heads: attention heads, if the weights cannot tell; 0 = the paper's for their width.
    """
    folder = out or run.parent / f"{run.resolve().name}-{to}-{which}"
    difference = export_encoder(
        run,
        folder,
        to=to,
        role=which,
        image_size=image_size,
        heads=heads,
        describe_results=lambda w: results.format_table(results.results_folder(w.path), which),
    )
    print(
        f"{folder}: same features within {difference:.1e}; {folder / 'README.md'} says how to load"
    )


def show_encoder(
    run: RunFolder,
    /,
    *,
    options: Annotated[LookOptions, tyro.conf.arg(name="")] = LookOptions(),  # noqa: B008
    out: Path | None = None,
) -> None:
    """Draw what an encoder sees: attention maps, nearest neighbours, a histogram of similarities.

    Args:
        run: run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder).
        options: encoder, shards and numbers of images.
        out: folder of the pictures; empty = RUN/look-WHICH, or FILE-evaluation/look-WHICH.
    """
    folder = out or results.results_folder(run) / f"look-{options.which}"
    for path in draw_pictures(run, folder, options):
        print(path)


# -------------------------------------------------------------------------- steps, views, machines


def repeat_step(run: RunFolder, step: Annotated[int, tyro.conf.Positional], /) -> None:
    """Run one step of a run again, exactly, and show each stage of it and the samples to blame.

    For a step that RUN/trouble/step-N.json describes, or any other. The run continues from the
    nearest checkpoint before the step: bit for bit on as many ranks as it had (CPU), e.g.
    `torchrun --nproc-per-node 8 -m mocov3_ds.cli replay RUN STEP`; else up to rounding.

    Args:
        run: run folder; its trouble/ gets the views of the samples as PNG.
        step: number of the step, counted from 1 as in metrics.jsonl.
    """
    from mocov3_ds.faults.replay import replay_step  # the engine takes seconds to import

    for line in replay_step(run, step):
        if ranks.is_first():
            print(line)


def draw_views(
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
        out: PNG file to write.
        rows: number of samples that are shown.
        size: side of a view, pixels.
        seed: seed of the run, which decides the views.
        epoch: number of the pass over the data, from 0.
    """
    from mocov3_ds.data.views.contact_sheet import draw_contact_sheet  # torchvision takes seconds

    largest = draw_contact_sheet(shards, out, rows=rows, size=size, seed=seed, epoch=epoch)
    print(f"{out}: ours differs from the same draws by Pillow by at most {largest} of 255")


def study_stability() -> None:
    """Study huge batches: grids of runs, their report, the replay of an event (see --help)."""


def write_launch_files(
    kind: Annotated[Kind, tyro.conf.Positional],
    train: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    cluster: Annotated[LaunchSettings, tyro.conf.arg(name="")] = LaunchSettings(),  # noqa: B008
    out: Path | None = None,
) -> None:
    """Write the files that start a run on a cluster.

        mocov3 launch slurm --nodes 4 --gpus 8 -- --recipe vit_l16 --data.shards s3://bucket/imagenet

    Args:
        kind: Slurm, plain Kubernetes, DeepSpeed's own launcher over ssh, torchrun or accelerate on
            each node, or the file that builds a container image.
        train: flags of train.py, after --
        cluster: the machines and what they have.
        out: folder to make; empty = launch-KIND.
    """
    folder = out or Path(f"launch-{kind}")
    for path in write_kit(kind, cluster, folder, train):
        print(path)


# -------------------------------------------------------------------------------- the command line

COMMANDS: dict[str, Callable[..., None]] = {
    "knn": evaluate_knn,
    "export": export_weights,
    "look": show_encoder,
    "views": draw_views,
    "replay": repeat_step,
    "launch": write_launch_files,
    "plan": plan,
    "stability": study_stability,
}


def main() -> int:
    """Run the command `mocov3`; its exit status: 0, or 2 after one error sentence."""
    try:
        try:
            return _run_command()
        finally:
            sys.stdout.flush()  # here, where a broken pipe can be caught
    except BrokenPipeError:  # `| head` has read enough; a shell calls that 128 + SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141


def _run_command() -> int:
    if sys.argv[1:2] == ["stability"]:  # a command with commands of its own
        from mocov3_ds.stability import commands

        return commands.main(sys.argv[2:] or ["--help"])
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="mocov3")
    except ValueError as error:
        if ranks.is_first():
            print(f"mocov3: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # perhaps of one machine only: each rank says its own
        message = f"{error.filename}: {error.strerror}." if error.filename else f"{error}"
        print(f"mocov3: error: {message}", file=sys.stderr)
        return 2
    finally:
        ranks.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
