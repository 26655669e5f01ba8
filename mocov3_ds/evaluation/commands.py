"""What `mocov3 knn`, `export`, `embed` and `look` do; the front door `cli` imports this."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.export import export_encoder
from mocov3_ds.encoders.foreign_names import Format
from mocov3_ds.encoders.hub import check_repository, push_folder
from mocov3_ds.encoders.load import Weights, build_encoder, read_weights
from mocov3_ds.encoders.networks import EncoderRole
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.embed import EmbedOptions, embed_images
from mocov3_ds.evaluation.features import split_features
from mocov3_ds.evaluation.knn import knn_accuracy
from mocov3_ds.evaluation.labelled_images import Splits, choose_split_urls, open_splits
from mocov3_ds.evaluation.pictures import LookOptions, draw_pictures

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
        split_features(
            encoder,
            split,
            image_size=size,
            batch=batch,
            threads=threads,
            mean=weights.settings.mean,
            std=weights.settings.std,
        )
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
    push: str = "",
    private: bool = False,
) -> None:
    """Write an encoder for another program, with a model card, and check its features there.

    Args:
        run: run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder).
        to: program that will load it: timm, DeiT, transformers (hf) or the published MoCo v3 code.
        which: base or momentum encoder.
        out: folder to make; empty = RUN-TO-WHICH beside the run.
        image_size: side of an image, pixels; 0 = as pretrained.
        heads: attention heads, if the weights cannot tell; 0 = the paper's for their width.
        push: repository USER/NAME of a Hub (HF_ENDPOINT, with the token of HF_TOKEN or of
            `hf auth login`) that gets the folder, too; empty = none.
        private: whether a repository that is made for it is seen by its owner alone.
    """
    if push:
        check_repository(push)
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
    if push:
        print(f"pushed to {push_folder(folder, push, private=private)}")


def write_features(
    run: RunFolder,
    images: Annotated[str, tyro.conf.Positional],
    /,
    *,
    out: Path,
    options: Annotated[EmbedOptions, tyro.conf.arg(name="")] = EmbedOptions(),  # noqa: B008
) -> None:
    """Write the features of all images of a set, with ids and labels, for other programs.

    Works on all ranks: `torchrun --nproc-per-node 8 -m mocov3_ds.cli embed RUN IMAGES --out FILE`.

    Args:
        run: run folder, or anything else that holds an encoder (see mocov3_ds.load_encoder).
        images: folder or URL of shards, or a folder of images.
        out: file to write: .parquet, .npz or .safetensors.
        options: encoder, size and type of the features.
    """
    ranks.start()
    line = embed_images(run, images, out, options)
    if ranks.is_first():
        print(line)


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
