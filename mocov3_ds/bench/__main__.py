"""`python -m mocov3_ds.bench NAME [options]`: run the benchmark in `mocov3_ds/bench/NAME.py`.

A benchmark is a module of this folder with a function `run_bench(options)`. The type of `options`
is a dataclass whose fields are the flags; no registration is needed.
"""

import ast
import importlib
import sys
from pathlib import Path
from typing import get_type_hints

import tyro

from mocov3_ds.settings.spelling import did_you_mean


def list_benchmarks() -> dict[str, str]:
    """Name of each benchmark and the first line of its docstring; none of them is imported."""
    benchmarks = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text())
        if any(
            isinstance(node, ast.FunctionDef) and node.name == "run_bench" for node in tree.body
        ):
            benchmarks[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return benchmarks


def main(arguments: list[str]) -> int:
    """List the benchmarks or run one; returns the exit status, 2 for a bad name or bad options."""
    names = list_benchmarks()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m mocov3_ds.bench NAME [options]   (NAME --help: its options)\n")
        width = max(map(len, names))
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in names.items()))
        return 0
    name, *flags = arguments
    if name not in names:
        hint = did_you_mean(name, names)
        print(f"bench: error: no benchmark {name!r}{hint}; there are {', '.join(names)}.")
        return 2
    module = importlib.import_module(f"mocov3_ds.bench.{name}")
    options = tyro.cli(
        get_type_hints(module.run_bench)["options"],
        args=flags,
        prog=f"python -m mocov3_ds.bench {name}",
        description=module.__doc__,
    )
    try:
        module.run_bench(options)
    except (ValueError, OSError) as error:
        print(f"bench {name}: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
