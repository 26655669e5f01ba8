"""`python -m mocov3_ds.bench NAME [options]`: run the benchmark in `mocov3_ds/bench/NAME.py`.

A benchmark is a module of this folder with a function `command()` that reads its own options from
the command line; it needs no registration.
"""

import ast
import difflib
import importlib
import sys
from pathlib import Path


def benchmarks() -> dict[str, str]:
    """Name of each benchmark -> first line of its docstring, without importing any."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        tree = ast.parse(path.read_text())
        if any(isinstance(node, ast.FunctionDef) and node.name == "command" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """List the benchmarks or run one; 2 for a name that there is not, or bad options."""
    names = benchmarks()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m mocov3_ds.bench NAME [options]   (NAME --help: its options)\n")
        width = max(map(len, names))
        print("\n".join(f"  {name:<{width}}  {about}" for name, about in names.items()))
        return 0
    name = arguments[0]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        print(f"bench: error: no benchmark {name!r}{hint}; there are {', '.join(names)}.")
        return 2
    sys.argv = [f"{sys.argv[0]} {name}", *arguments[1:]]
    try:
        importlib.import_module(f"mocov3_ds.bench.{name}").command()
    except ValueError as error:
        print(f"bench {name}: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
