"""One set on all ranks: one of each machine checks it, the others map the same file."""

import pytest

from mocov3_ds.data.shared_set import load_on_ranks
from mocov3_ds.distributed import machines
from tests.data.sets import make_set
from tests.ranks_pool import run_ranks


def test_one_rank_of_a_machine_checks_for_all(tmp_path, reads, monkeypatch):
    """The ranks of two machines, one after another; what they tell each other is kept between."""
    made = make_set(str(tmp_path / "set"), [3, 4])
    reports = []
    for rank in range(4):
        host, local_rank = f"node{rank // 2}", rank % 2
        monkeypatch.setattr(machines.socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(machines.ranks, "local_rank", lambda number=local_rank: number)
        monkeypatch.setattr(machines.ranks, "world_size", lambda: 4)

        def gather(report):
            reports.append(report)
            return reports

        monkeypatch.setattr(machines.ranks, "gather_objects", gather)
        reads.clear()
        assert load_on_ranks(str(tmp_path / "set")).digest == made.digest
        own = ["manifest.json", "index.bin"] if local_rank == 0 else ["manifest.json"]
        assert [url.rpartition("/")[2] for url in reads] == own
    reports.clear()
    with pytest.raises(ValueError, match="holds no manifest"):
        load_on_ranks(str(tmp_path))


def opened_digest(url):
    try:
        return load_on_ranks(url).digest
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_real_ranks_open_one_set(tmp_path):
    made = make_set(str(tmp_path / "set"), [3, 4])
    assert run_ranks(3, opened_digest, str(tmp_path / "set")) == [made.digest] * 3
    said = run_ranks(2, opened_digest, str(tmp_path / "none"))
    assert said[0] == said[1] and "holds no manifest.json" in said[0]
