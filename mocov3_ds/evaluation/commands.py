"""What `mocov3 knn`, `export`, `embed` and `look` do; the front door `cli` imports this."""

from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from mocov3_ds.distributed import ranks
from mocov3_ds.encoders.choices import EncoderRole
from mocov3_ds.encoders.export import export_encoder
from mocov3_ds.encoders.hub import check_repository, push_folder
from mocov3_ds.encoders.load import build_encoder, read_weights
from mocov3_ds.encoders.weights import Weights
from mocov3_ds.evaluation import results
from mocov3_ds.evaluation.embed import embed_images
from mocov3_ds.evaluation.features import split_features
from mocov3_ds.evaluation.flags import EmbedCommand, ExportOptions, KnnOptions, LookCommand
from mocov3_ds.evaluation.knn import classify_probes
from mocov3_ds.evaluation.label_lists import (
    ListedSplits,
    average_precisions,
    open_listed_splits,
    score_classes,
    write_precisions,
)
from mocov3_ds.evaluation.labelled_images import Splits, choose_split_urls, open_splits
from mocov3_ds.evaluation.per_class import write_class_table
from mocov3_ds.evaluation.pictures import draw_pictures
from mocov3_ds.model.shapes import write_size

# ------------------------------------------------------------------------------- a trained encoder


def evaluate_knn(options: Annotated[KnnOptions, tyro.conf.arg(name="")]) -> None:
    """Measure, print and record the k-NN accuracy of an encoder; each rank calls it.

    Args:
        options: encoder, splits and vote.

    Raises:
        ValueError: anything a user can have wrong.
    """
    role, k, temperature = options.which, options.k, options.temperature
    device = ranks.start()
    if min(k, options.batch) < 1 or temperature <= 0:
        raise ValueError(
            f"k {k}, batch {options.batch}, temperature {temperature} must be positive."
        )
    weights = read_weights(options.run, role, heads=options.heads)
    urls = choose_split_urls(weights, options.train, options.val)
    splits = open_listed_splits(*urls, options.labels) if options.labels else open_splits(*urls)
    size = weights.size_for(options.image_size)
    encoder = build_encoder(weights, image_size=options.image_size).to(device)
    (bank_ND, labels_N, _), (probes_PD, targets_P, _) = (
        split_features(
            encoder,
            split,
            image_size=size,
            batch=options.batch,
            threads=options.threads,
            mean=weights.settings.mean,
            std=weights.settings.std,
        )
        for split in (splits.train, splits.val)
    )
    if isinstance(splits, ListedSplits):
        entry = _judge_lists(options, splits, bank_ND, probes_PD)
    else:
        entry = _judge_classes(options, splits, (bank_ND, labels_N), (probes_PD, targets_P))
    entry |= {"k": k, "temperature": temperature, "image_size": write_size(size)}
    entry |= {"bank_images": len(labels_N), "val_images": len(targets_P)}
    if ranks.is_first():
        folder = options.out or results.results_folder(weights.path)
        _report_knn(folder, role, entry | _describe_sources(weights, splits))


def _judge_classes(
    options: KnnOptions, splits: Splits, bank: tuple[Tensor, Tensor], probes: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """Top-1 in percent of images that have one class, and the table of `--per_class`."""
    share = slice(ranks.rank(), None, ranks.world_size())
    (bank_ND, labels_N), (probes_PD, targets_P) = bank, probes
    classes_P = classify_probes(
        bank_ND[share], labels_N[share], probes_PD, k=options.k, temperature=options.temperature
    )
    if options.per_class is not None and ranks.is_first():
        write_class_table(options.per_class, classes_P, targets_P, splits.train.classes)
    return {"top1": 100.0 * int((classes_P == targets_P).sum()) / len(targets_P)}


def _judge_lists(
    options: KnnOptions, splits: ListedSplits, bank_ND: Tensor, probes_PD: Tensor
) -> dict[str, Any]:
    """Mean average precision in percent of images that have lists of classes, and the table."""
    share = slice(ranks.rank(), None, ranks.world_size())
    rows_N = torch.arange(len(bank_ND), device=bank_ND.device)
    score_PC = score_classes(
        bank_ND[share],
        rows_N[share],
        splits.has_train_NC.to(bank_ND.device),
        probes_PD,
        k=options.k,
        temperature=options.temperature,
    )
    precision_C = average_precisions(score_PC.cpu(), splits.has_val_PC)
    if options.per_class is not None and ranks.is_first():
        write_precisions(options.per_class, splits.classes, splits.has_val_PC, precision_C)
    return {"mean_ap": 100.0 * float(precision_C.nanmean()), "labels": options.labels}


def _describe_sources(weights: Weights, splits: Splits | ListedSplits) -> dict[str, Any]:
    """The encoder and the sets that an accuracy belongs to, as results.json names them."""
    return {
        "encoder": weights.title,
        "step": weights.saved.step if weights.saved is not None else None,
        "train": splits.train.digest,
        "val": splits.val.digest,
    }


def _report_knn(folder: Path, which: EncoderRole, entry: dict[str, Any]) -> None:
    """Write the entry to results.json and print it."""
    is_multilabel = "mean_ap" in entry
    results.record_result(folder, "multilabel" if is_multilabel else "knn", which, entry)
    score = (
        f"mean average precision {entry['mean_ap']:.2f} % on"
        if is_multilabel
        else f"{entry['top1']:.2f} % of"
    )
    print(
        f"k-NN (k = {entry['k']}, T = {entry['temperature']}) of {entry['encoder']}: "
        f"{score} {entry['val_images']} held-out images, bank of {entry['bank_images']}"
    )
    print(results.format_table(folder, which))


def export_weights(options: Annotated[ExportOptions, tyro.conf.arg(name="")]) -> None:
    """Write an encoder for another program, and push it where that is asked for.

    Args:
        options: encoder, program, folder and repository.

    Raises:
        ValueError: anything a user can have wrong.
    """
    run, role, push = options.run, options.which, options.push
    if push:
        check_repository(push)
    folder = options.out or run.parent / f"{run.resolve().name}-{options.to}-{role}"
    difference = export_encoder(
        run,
        folder,
        to=options.to,
        role=role,
        image_size=options.image_size,
        heads=options.heads,
        describe_results=lambda w: results.format_table(results.results_folder(w.path), role),
    )
    print(
        f"{folder}: same features within {difference:.1e}; {folder / 'README.md'} says how to load"
    )
    if push:
        print(f"pushed to {push_folder(folder, push, private=options.private)}")


def write_features(options: Annotated[EmbedCommand, tyro.conf.arg(name="")]) -> None:
    """Write the features of all images of a set; each rank calls it.

    Args:
        options: encoder, images, file, size and type of the features.
    """
    ranks.start()
    line = embed_images(options.run, options.images, options.out, options)
    if ranks.is_first():
        print(line)


def show_encoder(options: Annotated[LookCommand, tyro.conf.arg(name="")]) -> None:
    """Draw what an encoder sees, and print the paths of the pictures.

    Args:
        options: encoder, folder, shards and numbers of images.
    """
    folder = options.out or results.results_folder(options.run) / f"look-{options.which}"
    for path in draw_pictures(options.run, folder, options):
        print(path)
