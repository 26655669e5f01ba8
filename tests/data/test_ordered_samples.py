"""The exact order as a first stage of other people's pipelines."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

import mocov3_ds.data
from mocov3_ds.data import ordered_samples
from mocov3_ds.data.ordered_samples import OrderedSamples
from tests.data.loading import SIZES, open_loader
from tests.data.sets import make_set

ORDER = {"batch": 12, "seed": 3, "lanes": 4, "pool": 24}
"""As `loading.open_loader` has it: 52 samples, 4 batches an epoch."""


def flat(batches):
    return [number for batch in batches for number in batch]


def number_of(sample):
    assert int(sample["cls"]) == int(sample["__key__"].removeprefix("img"))
    return int(sample["cls"])


def take_batches(manifest, world_size, workers, *, states=None, epochs=1, stop=None):
    """Batches of ids of all ranks together, as loops over data loaders take them; then states."""
    parts, after = [], []
    for rank in range(world_size):
        samples = OrderedSamples(manifest, rank=rank, world_size=world_size, epochs=epochs, **ORDER)
        if states:
            samples.load_state_dict(json.loads(json.dumps(states[rank % len(states)])))
        loader = DataLoader(
            samples, batch_size=samples.rank_batch, num_workers=workers, collate_fn=list
        )
        batches = []
        for batch in loader:
            batches.append([number_of(sample) for sample in batch])
            if len(batches) == stop:
                break
        parts.append(batches)
        after.append(samples.state_dict(batches=len(batches)))
    assert all(after[0] == state for state in after)
    return [flat(batch) for batch in zip(*parts, strict=True)], after


@pytest.fixture(scope="module")
def planned(small):
    """Ids of the first ten global batches, as training takes them."""
    with open_loader(small) as loader:
        return [next(loader).sample_ids_B.tolist() for _ in range(10)]


@pytest.mark.parametrize("world_size, workers", [(1, 0), (2, 0), (3, 0), (1, 2), (2, 1)])
def test_batches_are_those_of_training(small, planned, world_size, workers):
    batches, _ = take_batches(small, world_size, workers, epochs=2)
    assert batches == planned[:8]
    for epoch in (batches[:4], batches[4:]):
        ids = flat(epoch)
        assert len(ids) == len(set(ids)) == 48, "each sample once, but for the remainder of 4"


def test_another_number_of_ranks_and_workers_goes_on(small, planned):
    _, states = take_batches(small, 3, 0, epochs=2, stop=3)
    assert states[0]["position"] == 3 and states[0]["handed"] == 0
    batches, states = take_batches(small, 1, 2, states=states, stop=1)
    assert batches == planned[3:4]
    batches, states = take_batches(small, 2, 0, states=states, epochs=None, stop=6)
    assert batches == planned[4:10]


def test_an_iteration_ends_with_its_epoch_and_set_epoch_begins_one(small, planned):
    samples = OrderedSamples(small, rank=0, world_size=1, **ORDER)
    ids = np.reshape([number_of(sample) for sample in samples], (-1, 12)).tolist()
    assert ids == planned[:4] and len(samples) == 48
    assert samples.state_dict()["position"] == 4
    samples.set_epoch(1)
    assert [number_of(sample) for sample in samples] == flat(planned[4:8])
    samples.load_state_dict({**samples.state_dict(), "position": 7})
    assert len(samples) == 12 and samples.epoch == 1
    assert [number_of(sample) for sample in samples] == planned[7]


def test_in_the_middle_of_a_batch_only_the_same_process_goes_on(small, planned):
    samples = OrderedSamples(small, rank=0, world_size=1, **ORDER)
    iterator = iter(samples)
    taken = [number_of(next(iterator)) for _ in range(17)]
    iterator.close()
    state = samples.state_dict()
    assert (state["position"], state["handed"], state["consumer"]) == (1, 5, [0, 1, 0, 1])
    again = OrderedSamples(small, rank=0, world_size=1, **ORDER)
    again.load_state_dict(state)
    assert len(again) == 31
    assert taken + [number_of(sample) for sample in again] == flat(planned[:4])
    other = OrderedSamples(small, rank=1, world_size=2, **ORDER)
    other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"middle of a batch.*state_dict\(batches=BATCHES TAKEN\)"):
        next(iter(other))


class InWorker:
    """Iterate as a worker of a `DataLoader` does, in this process."""

    def __init__(self, monkeypatch, worker, workers):
        info = type("Info", (), {"id": worker, "num_workers": workers})
        monkeypatch.setattr("mocov3_ds.data.ordered_samples.get_worker_info", lambda: info)


def test_a_worker_has_a_state_of_its_own(small, planned, monkeypatch):
    """As torchdata's StatefulDataLoader asks for it: in each worker, after each batch."""
    InWorker(monkeypatch, 1, 3)
    samples = OrderedSamples(small, rank=0, world_size=1, epochs=2, **ORDER)
    iterator = iter(samples)
    taken = [number_of(next(iterator)) for _ in range(20)]
    state = pickle.loads(pickle.dumps(samples.state_dict()))
    iterator.close()
    again = OrderedSamples(small, rank=0, world_size=1, epochs=2, **ORDER)
    again.load_state_dict(state)
    ids = taken + [number_of(sample) for sample in again]
    assert ids == planned[1] + planned[4] + planned[7]
    again.load_state_dict(state)
    InWorker(monkeypatch, 1, 2)
    with pytest.raises(ValueError, match="middle of a batch"):
        next(iter(again))


def test_a_worker_reads_its_own_samples_alone(small, planned, monkeypatch):
    read, asked = ordered_samples.read_whole_samples, []

    def noted(manifest, sample_ids_M, stop):
        asked.extend(sample_ids_M.tolist())
        return read(manifest, sample_ids_M, stop)

    monkeypatch.setattr(ordered_samples, "read_whole_samples", noted)
    InWorker(monkeypatch, 1, 3)
    samples = OrderedSamples(small, rank=0, world_size=1, epochs=2, **ORDER)
    handed = [number_of(sample) for sample in samples]
    assert handed == planned[1] + planned[4] + planned[7] and sorted(asked) == sorted(handed)


def test_only_the_loop_knows_what_it_took_of_workers(small):
    samples = OrderedSamples(small, rank=0, world_size=1, **ORDER)
    assert samples.state_dict()["position"] == 0
    loader = DataLoader(samples, batch_size=12, num_workers=1, collate_fn=list)
    next(iter(loader))
    with pytest.raises(ValueError, match=r"ahead of the loop.*state_dict\(batches=N\)"):
        samples.state_dict()
    assert samples.state_dict(batches=1)["position"] == 1
    samples.set_epoch(2)
    assert samples.state_dict()["position"] == 8


def test_first_stage_of_a_webdataset_pipeline(small, planned):
    samples = OrderedSamples(small, rank=0, world_size=1, **ORDER)
    pipeline = webdataset.DataPipeline(
        samples,
        webdataset.decode(),
        webdataset.to_tuple("cls", "__key__"),
        webdataset.batched(12, partial=False),
    )
    ids = [labels.tolist() for labels, _ in pipeline]
    assert ids == planned[:4] and samples.state_dict()["position"] == 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_contents_are_those_of_webdatasets_own_reader(small):
    urls = [small.shard_url(shard) for shard, count in enumerate(SIZES) if count]
    reader = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    expected = {sample["__key__"]: sample for sample in reader}
    for sample in OrderedSamples(small, rank=0, world_size=1, **ORDER):
        wanted = expected[sample["__key__"]]
        assert sample == {key: wanted[key] for key in wanted if key != "__local_path__"}


def test_a_default_loader_collates_plain_samples(small):
    samples = OrderedSamples(small, rank=0, world_size=1, **ORDER)
    batch = next(iter(DataLoader(samples, batch_size=12)))
    assert set(batch) == {"__key__", "__url__", "jpg", "cls"} and len(batch["jpg"]) == 12


def test_ranks_are_found(small, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    samples = OrderedSamples(small, **ORDER)
    assert (samples.rank, samples.world_size, samples.rank_batch) == (2, 3, 4)
    with pytest.raises(ValueError, match=r"give both rank .1. and world_size .None."):
        OrderedSamples(small, rank=1, **ORDER)
    with pytest.raises(ValueError, match="equal share of a batch of 12"):
        OrderedSamples(small, rank=0, world_size=5, **ORDER)
    with pytest.raises(ValueError, match="epochs=0 gives no samples"):
        OrderedSamples(small, epochs=0, **ORDER)


def test_a_state_of_other_samples_is_refused(small, tmp_path):
    samples = OrderedSamples(small, rank=0, world_size=1, **ORDER)
    state = samples.state_dict()
    other = OrderedSamples(small, rank=0, world_size=1, **{**ORDER, "seed": 4})
    with pytest.raises(ValueError, match="seed 3 there, 4 here"):
        other.load_state_dict(state)
    elsewhere = OrderedSamples(make_set(str(tmp_path), [60]), rank=0, world_size=1, **ORDER)
    with pytest.raises(ValueError, match="set '"):
        elsewhere.load_state_dict(state)
    with pytest.raises(TypeError):
        len(OrderedSamples(small, rank=0, world_size=1, epochs=None, **ORDER))


def test_the_example_of_the_chapter_runs(small, tmp_path, monkeypatch):
    chapter = Path(mocov3_ds.data.__file__).with_name("README.md").read_text()
    example = re.search(r"```python\n(from mocov3_ds\.data import .*?)```", chapter, re.DOTALL)
    assert example is not None
    code = example[1].replace("s3://bucket/imagenet/train", small.url)
    code = code.replace("batch=4096", "batch=12").replace("num_workers=8", "num_workers=0")
    steps = []
    monkeypatch.chdir(tmp_path)
    exec(code, {"train_on": lambda images, labels: steps.append((len(images), len(labels)))})
    assert steps == [(12, 12)] * 8
    assert torch.load(tmp_path / "samples.pt")["position"] == 8
