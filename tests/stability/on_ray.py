"""Run the cells of a prepared grid on a Ray of this machine; run as a program.

python -m tests.stability.on_ray FOLDER NAMES...
"""

import sys
from pathlib import Path

import ray

from mocov3_ds.stability.executors import run_on_ray

if __name__ == "__main__":
    ray.init(num_cpus=1, log_to_driver=False, include_dashboard=False)
    for outcome in run_on_ray(Path(sys.argv[1]), sys.argv[2:]):
        print(outcome.cell, outcome.status)
    ray.shutdown()
