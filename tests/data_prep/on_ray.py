"""Shard on a Ray cluster of three nodes on this machine, and kill one halfway; run as a program.

python -m tests.data_prep.on_ray TREE OUT
"""

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from data_prep import engines
from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images


def main() -> None:
    tree, out = sys.argv[1], Path(sys.argv[2])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    killed_at: list[int] = []

    def kill_halfway() -> None:
        while (done := len([*out.glob("receipts/*.json")])) < 8:
            time.sleep(0.01)
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed_at.append(done)

    killer = threading.Thread(target=kill_halfway, daemon=True)
    killer.start()
    options = ShardOptions(shard_size="5", resize=48)
    listing = list_images(tree)
    summary = make_shards(
        listing, str(out), options, workers=0, engine=engines.ray_cluster, quiet=True
    )
    killer.join(timeout=30)
    deadline = time.monotonic() + 90  # the cluster takes its time to declare a node dead
    while (alive := sum(node["Alive"] for node in ray.nodes())) == 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps({"killed_at": killed_at, "alive": alive, "samples": summary.manifest.samples}))


if __name__ == "__main__":
    main()
