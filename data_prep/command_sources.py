"""How is what a command prints read in any order? By way of a file in a scratch folder.

`pipe:COMMAND` is how webdataset's lists name a stream, such as `pipe:aws s3 cp s3://b/t.tar -`. A
command may do anything, so it runs only where the user has said so.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from data_prep.member_names import quote_name

PREFIX = "pipe:"


def names_command(text: str) -> bool:
    """Whether a source, or a part of one that is joined by `::`, is a command."""
    return any(source_part.startswith(PREFIX) for source_part in text.split("::"))


def shorten_commands(source: str) -> str:
    """A source as it is shown and stored: of commands the program alone, as they may hold secrets.

    `pipe:curl -H "Authorization: ..." URL` gives `pipe:curl ...`.
    """
    parts = source.split("::")
    return "::".join(
        _shorten(source_part) if source_part.startswith(PREFIX) else source_part
        for source_part in parts
    )


def _shorten(text: str) -> str:
    program, _, arguments = text.removeprefix(PREFIX).strip().partition(" ")
    shown_program = "..." if "=" in program else program
    return (
        f"{PREFIX}{shown_program} ..."
        if arguments and shown_program != "..."
        else PREFIX + shown_program
    )


def run_command(text: str, number: int, folder: Path) -> Path:
    """Run a command in a shell, and write what it prints to a file, which is taken for a tar.

    Args:
        text: `pipe:` and the command.
        number: Place of the command among all, which names the file.
        folder: Folder for the file.

    Raises:
        ValueError: The command fails, or prints nothing.
        OSError: The file cannot be written.
    """
    command, file = text.removeprefix(PREFIX), folder / f"pipe-{number:06d}.tar"
    shown_command = quote_name(_shorten(text))
    print(f"running {shown_command} into {quote_name(str(file))}", file=sys.stderr)
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with file.open("xb") as out:
                shutil.copyfileobj(process.stdout, out, 1 << 20)
        except BaseException:  # a full disk, or Ctrl-C: the command must not wait for its reader
            process.kill()
            raise
    if process.returncode:
        raise ValueError(
            f"{shown_command}, command {number + 1} of the source, ended with status "
            f"{process.returncode} after {file.stat().st_size} bytes."
        )
    if not file.stat().st_size:
        raise ValueError(
            f"{shown_command}, command {number + 1} of the source, printed nothing: no tar."
        )
    return file
