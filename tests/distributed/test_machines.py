"""What one rank of each machine does for the others."""

import pytest

from mocov3_ds.distributed import machines
from mocov3_ds.distributed.machines import run_on_first_of_machine


def play_ranks(monkeypatch, hosts, local_ranks, work):
    """What each of several ranks gets, one after another; reports of earlier ones are kept."""
    ended, reports = [], []
    for host, number in [
        *zip(hosts, local_ranks, strict=True)
    ] * 2:  # the second time all have told
        monkeypatch.setattr(machines.socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(machines.ranks, "local_rank", lambda number=number: number)
        monkeypatch.setattr(machines.ranks, "world_size", lambda: len(hosts))

        def gather(report):
            reports.append(report)
            return reports

        monkeypatch.setattr(machines.ranks, "gather_objects", gather)
        try:
            ended.append(run_on_first_of_machine(lambda host=host: work(host)))
        except ValueError as error:
            ended.append(str(error))
    return ended[len(hosts) :]


def test_each_machine_has_its_own_result(monkeypatch):
    hosts, numbers = ["a", "b", "a", "b"], [0, 0, 1, 1]
    assert play_ranks(monkeypatch, hosts, numbers, str.upper) == ["A", "B", "A", "B"]


def test_a_machine_without_a_first_rank_works_itself(monkeypatch):
    assert play_ranks(monkeypatch, ["a", "b"], [0, 1], str.upper) == ["A", "B"]


def test_all_hear_why_one_failed(monkeypatch):
    def fail_on_b(host):
        if host == "b":
            raise FileNotFoundError("no such set")
        return host

    said = play_ranks(monkeypatch, ["a", "b", "a"], [0, 0, 1], fail_on_b)
    assert said == ["no such set"] * 3


def test_a_process_alone_keeps_its_error():
    def fail():
        raise FileNotFoundError("no such set")

    assert run_on_first_of_machine(lambda: 3) == 3
    with pytest.raises(FileNotFoundError):
        run_on_first_of_machine(fail)
