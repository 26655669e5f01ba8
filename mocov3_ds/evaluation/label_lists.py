"""How well do neighbours tell the classes of images that have several, or none? Multi-label k-NN.

The classes of an image are a list in its KEY.json, which shards carry as their source had it:

    000017.jpg    000017.json  {"labels": ["person", "dog"], ...}

A class scores the share of the neighbours' votes that have it; the votes are those of `knn`. The
result is the mean average precision: for each class that a held-out image has, the held-out images
are ranked by its score, and the precision at each image that has it is averaged; then the mean over
these classes.

Shape suffixes: N = bank of this rank, G = bank of all ranks, P = probes, C = classes, K =
neighbours, D = features, R = ranked probes.
"""

import csv
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mocov3_ds.data import manifest as manifests
from mocov3_ds.data import storage
from mocov3_ds.data.class_names import comparable_name, list_names
from mocov3_ds.data.manifest import Manifest
from mocov3_ds.data.storage import atomic
from mocov3_ds.distributed import ranks
from mocov3_ds.evaluation.knn import find_nearest
from mocov3_ds.settings.spreadsheet import as_cell

_LONGEST_JSON = 1 << 20  # bytes of a KEY.json, as data_prep reads them


@dataclass(frozen=True)
class ListedSplits:
    """Two sets whose images have lists of classes."""

    train: Manifest
    val: Manifest
    classes: tuple[str, ...]
    """names of all classes of the training set, sorted"""
    has_train_NC: Tensor
    """whether a training image has a class, bool, in the order of the sample ids"""
    has_val_PC: Tensor


def open_listed_splits(train: str, val: str, entry: str) -> ListedSplits:
    """Open two sets with the lists of their images; each rank calls it.

    Args:
        train: folder or URL of the training shards.
        val: folder or URL of the held-out shards.
        entry: name of the list in each KEY.json.

    Raises:
        ValueError: a sample without such a list, no classes, or held-out classes that training has
            not.
    """
    sets = manifests.load(train), manifests.load(val)
    lists = [read_label_lists(manifest, entry) for manifest in sets]
    class_names = [{name for names in split_lists for name in names} for split_lists in lists]
    classes = tuple(sorted(class_names[0]))
    if not classes or not class_names[1]:
        empty = sets[0 if not classes else 1]
        raise ValueError(f"no image of {empty.url} has a class in {entry!r} of its KEY.json.")
    if missing := sorted(class_names[1] - class_names[0]):
        raise ValueError(
            f"{sets[1].url} holds images of {len(missing)} classes of which {sets[0].url} has "
            f"none: {list_names(missing)}; both must hold the same classes."
        )
    number_of = {name: number for number, name in enumerate(classes)}
    tables = []
    for split_lists in lists:
        has_NC = torch.zeros(len(split_lists), len(classes), dtype=torch.bool)
        for row, names in enumerate(split_lists):
            has_NC[row, [number_of[name] for name in names]] = True
        tables.append(has_NC)
    return ListedSplits(*sets, classes, *tables)


def read_label_lists(manifest: Manifest, entry: str) -> list[list[str]]:
    """Names of the classes of each sample, by sample id; the ranks share the shards.

    Args:
        manifest: index of the shards.
        entry: name of the list in each KEY.json.

    Raises:
        ValueError: a sample without such a list; the same on each rank.
    """
    names_by_sample: dict[int, list[str]] = {}
    problem = ""
    try:
        for shard in range(ranks.rank(), len(manifest.shards), ranks.world_size()):
            names_by_sample.update(_read_shard(manifest, shard, entry))
    except (ValueError, OSError, tarfile.TarError) as error:
        problem = f"{error}"
    parts = ranks.gather_objects((names_by_sample, problem))
    for _, text in parts:
        if text:
            raise ValueError(text)
    lists = {number: names for rank_names, _ in parts for number, names in rank_names.items()}
    if absent := [number for number in range(manifest.samples) if number not in lists]:
        raise ValueError(
            f"{len(absent)} of {manifest.samples} samples in {manifest.url} have no KEY.json with "
            f"a list {entry!r} (the first is sample {absent[0]}); shard them with the JSON files "
            "that name their classes beside them."
        )
    return [lists[number] for number in range(manifest.samples)]


def _read_shard(manifest: Manifest, shard: int, entry: str) -> Iterator[tuple[int, list[str]]]:
    """Sample id and classes of the samples of a shard that have a list."""
    first, end = manifest.first_S[shard : shard + 2].tolist()
    offsets = manifest.index_N["offset"][first:end].tolist()
    sample_at = {offset: first + origin for origin, offset in enumerate(offsets)}
    sample_of: dict[str, int] = {}
    list_of: dict[str, list[str]] = {}
    with (
        manifest.name_places(),
        storage.open_read(manifest.shard_url(shard)) as file,
        tarfile.open(fileobj=file, mode="r|") as tar,
    ):
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            key = f"{folder}/{key}"
            if member.offset_data in sample_at:
                sample_of[key] = sample_at[member.offset_data]
            elif suffix.lower() == "json" and member.size <= _LONGEST_JSON:
                content = tar.extractfile(member)
                assert content is not None
                origin = f"{entry!r} of {member.name} in {manifest.shards[shard].name}"
                names = parse_label_list(content.read(), entry, origin)
                if names is not None:
                    list_of[key] = names
    for key, number in sample_of.items():
        if key in list_of:
            yield number, list_of[key]


def parse_label_list(data: bytes, entry: str, place: str) -> list[str] | None:
    """Names of the classes in a KEY.json, numbers as text; None where it has no such entry.

    Args:
        data: bytes of the file.
        entry: name of the list.
        place: where that stands, for messages.

    Raises:
        ValueError: no JSON, or the entry is no list of names and whole numbers.
    """
    try:
        tree: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{place} cannot be read: the file is no JSON.") from None
    if not isinstance(tree, dict) or entry not in tree:
        return None
    values = tree[entry]
    if not isinstance(values, list):
        raise ValueError(f"{place} is {values!r:.60}; a list of names or whole numbers it must be.")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"{place} holds {value!r:.60}, neither a name nor a whole number.")
    return [comparable_name(str(value)) for value in values]


def score_classes(
    bank_ND: Tensor,
    rows_N: Tensor,
    has_GC: Tensor,
    probes_PD: Tensor,
    *,
    k: int,
    temperature: float,
    block: int = 256,
) -> Tensor:
    """Score (P, C) of each class from 0 to 1: the share of the votes whose image has it.

    Args:
        bank_ND: features of this rank's rows of the bank, of any length.
        rows_N: their rows in `has_GC`.
        has_GC: whether an image of the whole bank has a class.
        probes_PD: features to classify, the same on each rank.
        k: number of neighbours that vote.
        temperature: a neighbour votes with exp(cosine / temperature).
        block: number of probes compared in one go; bounds the memory.
    """
    bank_ND, has_GC = F.normalize(bank_ND.float(), dim=1), has_GC.float()
    scores = []
    for part_PD in torch.split(probes_PD.float(), block):
        cosine_PK, row_PK = find_nearest(bank_ND, rows_N, F.normalize(part_PD, dim=1), k)
        vote_PK = ((cosine_PK - cosine_PK[:, :1]) / temperature).exp()
        vote_PK = vote_PK / vote_PK.sum(1, keepdim=True)
        scores.append(torch.einsum("pk,pkc->pc", vote_PK, has_GC[row_PK]))
    return torch.cat(scores)


def average_precisions(score_PC: Tensor, has_PC: Tensor) -> Tensor:
    """Average precision (C,) of each class, fp64; NaN where no probe has it.

    It is the area under precision over recall in steps, without interpolation; probes of equal
    score come together, so that their order does not matter.

    Args:
        score_PC: score of each class.
        has_PC: whether a probe has it, bool.
    """
    precisions = []
    for score_P, has_P in zip(score_PC.T, has_PC.T, strict=True):
        score_R, order_R = score_P.sort(descending=True)
        hits_R = has_P[order_R].double().cumsum(0)
        is_last_R = torch.cat([score_R[1:] != score_R[:-1], score_R.new_ones(1).bool()])
        hits_R = hits_R[is_last_R]
        ranks_R = torch.arange(1, len(score_R) + 1, device=score_R.device)[is_last_R]
        gained_R = hits_R.diff(prepend=hits_R.new_zeros(1))
        precisions.append((gained_R * hits_R / ranks_R).sum() / hits_R[-1])
    return torch.stack(precisions)


def write_precisions(
    path: Path, classes: Sequence[str], has_PC: Tensor, precision_C: Tensor
) -> None:
    """Write a CSV table: class, held-out images that have it, average precision in percent.

    Args:
        path: file to write, whole or not at all.
        classes: names of the classes.
        has_PC: whether a held-out image has a class.
        precision_C: average precision of each class, NaN where no image has it.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["class", "images", "average_precision"])
    for name, images, precision in zip(
        classes, has_PC.sum(0).tolist(), precision_C.tolist(), strict=True
    ):
        if images:
            table.writerow([as_cell(name), images, f"{100 * precision:.2f}"])
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, text.getvalue())
