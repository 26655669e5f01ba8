"""The command `mocov3`, and the one door to all others: a name, a line of help, where it lives.

A command's module is imported when the command is used: networks and engines take seconds, which
help and a typo need not wait for.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mocov3_ds.settings import environment
from mocov3_ds.settings.paths import expand_home
from mocov3_ds.settings.spelling import did_you_mean
from mocov3_ds.version import __version__


class Command(NamedTuple):
    """A command: what it does in a line, and the function that runs it."""

    about: str
    target: str
    """MODULE:FUNCTION; it takes no arguments (and reads sys.argv), or those that `takes` says"""
    takes: str = ""
    """"arguments" for all that follows the name, "options" for what tyro reads of it"""
    first: str = ""
    """MODULE:FUNCTION that only reads the arguments, at once, for help and for what is wrong"""


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "pretrain an encoder, here on one rank (on many: deepspeed mocov3_ds/train.py, see README)",
        "mocov3_ds.train:main",
        first="mocov3_ds.recipes:parse",
    ),
    "status": Command(
        "is a run finished? (status 0 = yes, 1 = no)", "mocov3_ds.checkpoints.run_status:main"
    ),
    "knn": Command(
        "k-NN accuracy of an encoder",
        "mocov3_ds.evaluation.commands:evaluate_knn",
        "options",
        first="mocov3_ds.evaluation.flags:read_knn_flags",
    ),
    "linear": Command(
        "linear probe of an encoder",
        "mocov3_ds.evaluation.linear:main",
        first="mocov3_ds.evaluation.flags:read_linear_flags",
    ),
    "finetune": Command(
        "fine-tune an encoder end to end",
        "mocov3_ds.evaluation.finetune:main",
        first="mocov3_ds.evaluation.flags:read_finetune_flags",
    ),
    "look": Command(
        "pictures of what an encoder sees",
        "mocov3_ds.evaluation.commands:show_encoder",
        "options",
        first="mocov3_ds.evaluation.flags:read_look_flags",
    ),
    "export": Command(
        "write an encoder for timm, DeiT, transformers, MoCo v3",
        "mocov3_ds.evaluation.commands:export_weights",
        "options",
        first="mocov3_ds.evaluation.flags:read_export_flags",
    ),
    "embed": Command(
        "features of all images of a set, as parquet",
        "mocov3_ds.evaluation.commands:write_features",
        "options",
        first="mocov3_ds.evaluation.flags:read_embed_flags",
    ),
    "plan": Command(
        "what fits, how fast it runs and what it costs",
        "mocov3_ds.planning.command:run_plan",
        "options",
        first="mocov3_ds.planning.flags:read_flags",
    ),
    "launch": Command(
        "files that start a run on a cluster", "mocov3_ds.launch.kit:write_launch_files", "options"
    ),
    "doctor": Command("examine machines before a long run", "mocov3_ds.doctor:main"),
    "gpu": Command(
        "is a GPU right, and how fast: ten minutes",
        "mocov3_ds.bench.gpu.command:main",
        first="mocov3_ds.bench.gpu.flags:read_flags",
    ),
    "replay": Command(
        "one step of a run again, stage by stage", "mocov3_ds.faults.replay:repeat_step", "options"
    ),
    "views": Command(
        "a sheet of views as training sees them",
        "mocov3_ds.training.view_sheet_command:main",
    ),
    "report": Command(
        "a page about one run: curves, layers, alarms, settings, the command that repeats it",
        "mocov3_ds.stability.run_page:report",
        "options",
    ),
    "stability": Command(
        "study huge batches: grids of runs, their report, the replay of an event",
        "mocov3_ds.stability.commands:main",
        "arguments",
    ),
    "bench": Command(
        "the benchmarks of BENCHMARKS.md", "mocov3_ds.bench.__main__:main", "arguments"
    ),
}


def main() -> int:
    """Run the command `mocov3`; its exit status: the command's, or 2 after one error sentence."""
    try:
        try:
            return _run_command(expand_home(sys.argv[1:]))
        finally:
            sys.stdout.flush()  # here, where a broken pipe can be caught
    except BrokenPipeError:  # `| head` has read enough; a shell calls that 128 + SIGPIPE
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141


def _run_command(arguments: Sequence[str]) -> int:
    name, *flags = arguments or ["--help"]
    if name in ("-h", "--help", "help"):
        if not flags:
            print(describe_commands())
            return 0
        name, flags = flags[0], ["--help"]
    if name in ("-V", "--version"):
        print(f"mocov3-ds {__version__}")
        return 0
    if name.startswith("--tyro-"):
        return _print_completion(arguments)
    command = COMMANDS.get(name)
    if command is None:
        kind = "option" if name.startswith("-") else "command"
        print(
            f"mocov3: error: there is no {kind} {name!r}{did_you_mean(name, COMMANDS)}; commands "
            f"are {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    try:
        environment.check_environment()
        if command.first:
            _find_target(command.first)(flags)
    except ValueError as error:
        print(f"mocov3: error: {error}", file=sys.stderr)
        return 2
    run = _find_target(command.target)
    if command.takes == "options":
        return _run_function(name, run, flags)
    if command.takes == "arguments":
        return int(run(flags or ["--help"]))
    sys.argv = [f"mocov3 {name}", *flags]
    return int(run())


def _run_function(name: str, function: Any, arguments: Sequence[str]) -> int:
    """Exit status of a command whose function takes options: 0, or 2 after one error sentence."""
    import tyro  # a fifth of a second

    try:
        tyro.cli(function, prog=f"mocov3 {name}", args=arguments)
    except ValueError as error:
        ranks = sys.modules.get("mocov3_ds.distributed.ranks")
        if ranks is None or ranks.is_first():
            print(f"mocov3: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except OSError as error:  # perhaps of one machine only: each rank says its own
        message = f"{error.filename}: {error.strerror}." if error.filename else f"{error}"
        print(f"mocov3: error: {message}", file=sys.stderr)
        return 2
    finally:
        if "mocov3_ds.distributed.ranks" in sys.modules:
            sys.modules["mocov3_ds.distributed.ranks"].stop()
    return 0


def _print_completion(arguments: Sequence[str]) -> int:
    """Print the completion of a shell, as `mocov3 --tyro-print-completion SHELL` asks."""
    import tyro

    functions = {
        name: _find_target(command.target)
        if command.takes == "options"
        else _name_alone(command.about)
        for name, command in COMMANDS.items()
    }
    tyro.extras.subcommand_cli_from_dict(functions, prog="mocov3", args=arguments)
    return 0


def _name_alone(about: str) -> Callable[[], None]:
    """A command whose name alone is completed, as its flags are read by a program of its own."""

    def stand_in() -> None:
        pass

    stand_in.__doc__ = about
    return stand_in


def describe_commands() -> str:
    """The help of `mocov3` itself."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mocov3 COMMAND [options]   (COMMAND --help: its options; --version)",
            "",
            *lines,
            "",
            "shards are made by: python -m data_prep shard SRC DST",
        ]
    )


def _find_target(target: str) -> Any:
    """The function MODULE:FUNCTION; what its imports print goes to stderr, stdout is the command's.

    Args:
        target: name of a module and of a function in it, with a colon between.
    """
    module, _, function = target.partition(":")
    with contextlib.redirect_stdout(sys.stderr):
        imported = importlib.import_module(module)
    return getattr(imported, function)


if __name__ == "__main__":
    sys.exit(main())
