"""Machines and links of a cluster."""

from mocov3_ds.planning.cards import GB, PRESETS
from mocov3_ds.planning.hardware import read_cluster


def test_link_and_machines() -> None:
    one, two = read_cluster("8xA100"), read_cluster("16xA100", network=100)
    assert (one.nodes, two.nodes) == (1, 2)
    assert one.link_bandwidth == PRESETS["A100-80GB"].link_bandwidth
    assert two.link_bandwidth == 100 / 8 * GB
    assert read_cluster("8xA100", nodes=4).per_node == 2
    assert read_cluster("4xV100", interconnect=20).link_bandwidth == 20 * GB
    assert (one.title, two.title) == ("8 x A100-80GB", "16 x A100-80GB on 2 machines")


def test_every_machine_has_as_many_cards() -> None:
    for cards in (1, 7, 8, 9, 12, 13, 24, 30, 1001, 1024):
        cluster = read_cluster(f"{cards}xH100")
        assert cluster.nodes * cluster.per_node == cards
        assert cluster.per_node <= 8
    assert read_cluster("16xH100", nodes=1).per_node == 16
