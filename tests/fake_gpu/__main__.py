"""Count what the trainer does on a card that is not there.

    python -m tests.fake_gpu --memory_gb 23.6 --capability 8.9 --world 8 -- --recipe vit_s16 \\
        --batch 512 --data.shards SHARDS --knn.probes 0 --stop_after_steps 4

prints launches, copies, waits and memory of each step, and the places of the waits in the last one.
"""

import argparse
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from tests.fake_gpu.card import FakeGpu
from tests.fake_gpu.process import run_on_fake_gpu

_LIMIT_S = 1800.0
"""seconds that the program may take: large networks beside other work"""


def main() -> int:
    """Command line; returns the status of the trainer."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fake_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory_gb", type=float, default=79.1, help="memory of the card, GiB")
    parser.add_argument("--capability", default="9.0", help="compute capability, e.g. 8.9")
    parser.add_argument("--world", type=int, default=1, help="be rank 0 of this many ranks")
    parser.add_argument("--program", default="mocov3_ds.train", help="module whose main is called")
    parser.add_argument("--names", action="store_true", help="list the kernels of the last step")
    parser.add_argument("--environment", action="append", default=[], help="NAME=VALUE, repeatable")
    parser.add_argument("--unsaved", action="store_true", help="write no checkpoint of the run")
    parser.add_argument("--json", type=Path, help="file for status, output and steps")
    parser.add_argument("arguments", nargs="*", help="flags of the program, behind --")
    options = parser.parse_args()
    major, minor = map(int, options.capability.split("."))
    gpu = FakeGpu(memory_gb=options.memory_gb, capability=(major, minor))
    changes = dict(entry.split("=", 1) for entry in options.environment)
    folder = str(Path.cwd())
    counts = run_on_fake_gpu(
        count_program, options, folder, gpu=gpu, changes=changes, timeout=_LIMIT_S
    )
    status, text = counts["status"], counts["text"]
    print(text)
    if options.json:
        options.json.write_text(json.dumps(counts))
    return int(status)


def count_program(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Run the program on the fake card and return its status and what it did.

    Args:
        options: The command line.
        folder: Working folder of the program.
    """
    from tests.fake_gpu import inside

    os.chdir(folder)
    with contextlib.ExitStack() as stack:
        if options.world > 1:
            stack.enter_context(inside.pretended_world(options.world))
        if options.unsaved:
            from mocov3_ds.training.run import Run

            stack.enter_context(mock.patch.object(Run, "save_checkpoint"))
        use = stack.enter_context(inside.counted())
        finished = inside.run_program(options.program, options.arguments)
    use = finished.steps[-1] if finished.steps else use
    lines = [finished.output]
    lines += [f"step {number}: {step.describe()}" for number, step in enumerate(finished.steps, 1)]
    lines += [f"the last of them, or all: {use.describe()}", f"waits of the host, {use.syncs}:"]
    lines += [f"  {count} x {place}" for place, count in use.places.most_common()]
    lines += [f"  Triton {count} x {name}" for name, count in use.triton.most_common()]
    if options.names:
        lines += [f"  {count} x {name}" for name, count in use.names.most_common()]
    return {
        "status": finished.status,
        "text": "\n".join(lines),
        "output": finished.output,
        "steps": [vars(step) for step in finished.steps],
    }


if __name__ == "__main__":
    sys.exit(main())
