"""What is done once on each machine, for all ranks that run there?"""

import socket
from collections.abc import Callable
from typing import Any

from mocov3_ds.distributed import ranks


def run_on_first_of_machine(work: Callable[[], Any]) -> Any:
    """Let one rank of each machine do something, and return its result on all ranks there.

    Args:
        work: What rank 0 of each machine calls; its result must be small and can be pickled.

    Raises:
        ValueError: One of them raised a ValueError or an OSError; all ranks raise it with the same
            text, so that none waits for ever.
    """
    if ranks.world_size() == 1:
        return work()
    outcome: Any = None
    message: str | None = None
    if ranks.local_rank() == 0:
        try:
            outcome = work()
        except (ValueError, OSError) as error:
            message = str(error)
    host = socket.gethostname()
    reports = ranks.gather_objects((host, ranks.local_rank(), outcome, message))
    messages = [text for _, _, _, text in reports if text is not None]
    if messages:
        raise ValueError(messages[0])
    outcomes = [report[2] for report in reports if report[:2] == (host, 0)]
    # a launcher that counts ranks otherwise leaves a machine without its first one
    return outcomes[0] if outcomes else work()
