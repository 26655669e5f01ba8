"""Who talks to other ranks, and to DeepSpeed? Nothing else imports torch.distributed or deepspeed.

DeepSpeed's log lines go to stderr, whoever imports it first: stdout belongs to the command.
"""

import logging
import sys


def _keep_off_stdout(logger: logging.Logger) -> None:
    """Let the handlers that a library adds to its logger write to stderr instead of stdout."""

    def add_handler(hdlr: logging.Handler) -> None:
        if isinstance(hdlr, logging.StreamHandler) and hdlr.stream is sys.stdout:
            hdlr.setStream(sys.stderr)
        logging.Logger.addHandler(logger, hdlr)

    for handler in logger.handlers:  # imported before us
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
    logger.addHandler = add_handler  # type: ignore[method-assign]


_keep_off_stdout(logging.getLogger("DeepSpeed"))
