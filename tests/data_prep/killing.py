"""Kill the sharder at random moments, again and again, until it finishes; run as a program.

    python -m tests.data_prep.killing TREE FOLDER KILLS

Makes FOLDER/unbroken, and FOLDER/round0, ... until KILLS of the kills came after the first shard.

The moments are counted in function calls (Python's and C's), so they fall between any two of them
however fast the machine is. It forks, so it must have one thread; a test process has more. Prints,
as JSON, how many shards were finished at each kill.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from data_prep.shard import make_shards
from data_prep.shard_options import ShardOptions
from data_prep.sources import list_images

os.fsync = lambda descriptor: None  # kill -9 loses nothing that was written; a power cut would


class Countdown:
    """A profile function that kills this process at the n-th call."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, frame: object, event: str, argument: object) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    tree, folder, kills = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(0)
    calls = Countdown(0)
    once(tree, folder / "unbroken", calls)
    finished: list[int] = []
    rounds = 0
    while sum(count > 0 for count in finished) < kills:
        out = folder / f"round{rounds}"
        rounds += 1
        while True:
            moment = chance.randint(1, -calls.left)
            child = os.fork()
            if child == 0:
                once(tree, out, Countdown(moment))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                assert os.waitstatus_to_exitcode(status) == 0
                break
            finished.append(len([*out.glob("receipts/*.json")]))
    print(json.dumps(finished))


def once(tree: str, out: Path, profile: Countdown) -> None:
    listing = list_images(tree)
    sys.setprofile(profile)
    make_shards(listing, str(out), ShardOptions(shard_size="2"), workers=1, quiet=True)
    sys.setprofile(None)


if __name__ == "__main__":
    main()
