"""Measure the house: what a tool can count of how a code base reads.

    python tests/house/measure.py                       the table of this tree
    python tests/house/measure.py --tree DIR            of another checkout of it
    python tests/house/measure.py --before DIR          both side by side, as a Markdown table
    python tests/house/measure.py --list PATH [PATH]    what stands out in these files or folders

Product code is `mocov3_ds` and `data_prep`; test code is `tests`. Lines are all lines of a file.
"""

import argparse
import ast
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("mocov3_ds", "data_prep")

VAGUE = frozenset(Path(__file__).with_name("vague_words.txt").read_text().split())
"""Pronouns, adverbs and participles: as the name of a value they do not say what the value is."""

SHORT_ARGUMENT_WORDS = 3
LONGEST_FILE = 450


@dataclass
class House:
    """Everything that was counted, and where."""

    file_lines: dict[str, int] = field(default_factory=dict)
    code_lines: int = 0
    function_lines: dict[str, int] = field(default_factory=dict)
    function_names: dict[str, str] = field(default_factory=dict)
    assignments: int = 0
    vague: list[str] = field(default_factory=list)
    argument_entries: int = 0
    short_arguments: list[str] = field(default_factory=list)
    imports: dict[str, set[str]] = field(default_factory=dict)
    test_lines: int = 0
    untested_names: list[str] = field(default_factory=list)
    top_modules: int = 0
    folders: int = 0


def measure(root: Path) -> House:
    """Count everything of the checkout at `root`."""
    house = House()
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    modules = {module_name(path, root) for path in paths}
    for path in paths:
        relative, text = str(path.relative_to(root)), path.read_text()
        tree = ast.parse(text)
        house.file_lines[relative] = len(text.splitlines())
        house.imports[module_name(path, root)] = imported_modules(tree, modules)
        house.code_lines += code_lines(text, tree)
        count_functions(house, tree, relative)
        count_assignments(house, tree, relative)
    house.test_lines = sum(len(p.read_text().splitlines()) for p in (root / "tests").rglob("*.py"))
    house.untested_names = [str(p.relative_to(root)) for p in paths if not has_test_file(p, root)]
    top = root / "mocov3_ds"
    house.top_modules = sum(path.name != "__init__.py" for path in top.glob("*.py"))
    house.folders = len({path.relative_to(top).parts[0] for path in top.glob("*/*.py")})
    return house


def has_test_file(path: Path, root: Path) -> bool:
    """Whether a test file is named after a module and lies where the module lies."""
    if path.name in ("__init__.py", "__main__.py", "version.py"):
        return True
    relative = path.relative_to(root)
    folder = (
        relative.parent.relative_to("mocov3_ds")
        if relative.parts[0] == "mocov3_ds"
        else relative.parent
    )
    return (root / "tests" / folder / f"test_{path.name}").exists()


def module_name(path: Path, root: Path) -> str:
    """The dotted name that the file at `path` is imported by."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def code_lines(text: str, tree: ast.Module) -> int:
    """Lines of a file that are neither blank, nor a comment alone, nor inside a docstring."""
    lines = {
        number
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    }
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def imported_modules(tree: ast.Module, modules: set[str]) -> set[str]:
    """Own modules that a file imports anywhere: at its head, in functions, for typing alone."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in modules else node.module)
    return names & modules


def count_functions(house: House, tree: ast.Module, path: str) -> None:
    """Lengths and names of functions, and the entries of their `Args:`."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        where = f"{path}:{node.lineno} {node.name}"
        house.function_lines[where] = (node.end_lineno or node.lineno) - node.lineno + 1
        if not (node.name.startswith("__") and node.name.endswith("__")):
            house.function_names[where] = node.name
        for entry in argument_entries(ast.get_docstring(node) or ""):
            house.argument_entries += 1
            if len(entry.split()) - 1 <= SHORT_ARGUMENT_WORDS:
                house.short_arguments.append(f"{where}: {entry}")


def argument_entries(docstring: str) -> Iterator[str]:
    """Entries of the section `Args:`, each as one line `name: text`."""
    _, heading, section = docstring.partition("Args:\n")
    entry = ""
    for line in section.splitlines() if heading else ():
        if line and not line.startswith(" "):
            break  # the next section
        if line.startswith("    ") and not line.startswith("     "):
            if entry:
                yield entry
            entry = line.strip()
        else:
            entry = f"{entry} {line.strip()}".strip()
    if entry:
        yield entry


def count_assignments(house: House, tree: ast.Module, path: str) -> None:
    """Names that are given to values, and those among them that are vague."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            house.assignments += 1
            if not node.id.startswith("__") and node.id.strip("_") in VAGUE:
                house.vague.append(f"{path}:{node.lineno} {node.id}")


def words_of(name: str) -> int:
    """Number of words in a snake_case name."""
    return len([word for word in name.split("_") if word])


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in imports.get(module, ()):
            if target not in index:
                visit(target)
                low[module] = min(low[module], low[target])
            elif target in stack:
                low[module] = min(low[module], index[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for module in imports:
        if module not in index:
            visit(module)
    return groups


def rooms(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """The import graph with each top-level folder (or file) of a package as one node."""
    graph: dict[str, set[str]] = {}
    for module, targets in imports.items():
        graph.setdefault(room(module), set()).update(room(target) for target in targets)
    return {name: targets - {name} for name, targets in graph.items()}


def room(module: str) -> str:
    """The folder (or file) at the top of its package that a module lies in."""
    package, *inner = module.split(".")
    return f"{package}.{inner[0]}" if inner and package == "mocov3_ds" else package


def share(values: Sequence[int], quantile: float) -> int:
    """The value below which `quantile` of all values lie."""
    return sorted(values)[min(int(quantile * len(values)), len(values) - 1)]


@dataclass(frozen=True)
class Measure:
    """One row of the table."""

    name: str
    text: str
    """the value as the table shows it"""
    value: float
    at_most: float | None = None
    """the goal, if there is one"""
    at_least: float | None = None

    @property
    def goal(self) -> str:
        """The goal in words; empty = none."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        if self.at_most is None:
            return ""
        return f"<= {self.at_most:g}" if self.at_most else "0"

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached, or there is none."""
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )


def table(house: House) -> list[Measure]:
    """The measures of a tree, with their goals."""
    files, functions = list(house.file_lines.values()), list(house.function_lines.values())
    single = [name for name in house.function_names.values() if words_of(name) == 1]
    graph = rooms(house.imports)
    arrows = sum(map(len, graph.values()))
    median, tests = statistics.median(functions), house.test_lines / sum(files)
    short, entries = len(house.short_arguments), house.argument_entries
    return [
        Measure("product: files / lines", f"{len(files)} / {sum(files)}", sum(files)),
        count("product: lines of code", house.code_lines),
        count("modules at the top", house.top_modules, 6),
        count("folders at the top", house.folders),
        count("circles of modules", len(circles(house.imports)), 0),
        count("arrows between rooms", arrows),
        count("circles of rooms", len(circles(graph)), 0),
        percentage("function names of one word, %", len(single), len(house.function_names), 45),
        percentage("vague assignments, %", len(house.vague), house.assignments, 0.5),
        Measure(
            f"Args: entries of <= {SHORT_ARGUMENT_WORDS} words", f"{short} of {entries}", short, 5
        ),
        Measure("function lines: median", f"{median:g}", median),
        count("function lines: p95", share(functions, 0.95), 35),
        count("function lines: longest", max(functions), 60),
        count("file lines: longest", max(files), LONGEST_FILE),
        count("modules without a test file", len(house.untested_names), 0),
        Measure("test / code lines", f"{tests:.2f}", tests, at_least=0.7),
    ]


def count(name: str, value: int, at_most: int | None = None) -> Measure:
    """A row with a whole number."""
    return Measure(name, str(value), value, at_most)


def percentage(name: str, some: int, total: int, at_most: float | None = None) -> Measure:
    """A row with a share in percent."""
    value = 100 * some / max(total, 1)
    return Measure(name, f"{value:.2f}", value, at_most)


def compare(before: House, after: House) -> str:
    """Two trees side by side, as a Markdown table."""
    lines = ["| | before | after | goal |", "|---|---|---|---|"]
    for old, new in zip(table(before), table(after), strict=True):
        lines.append(f"| {new.name} | {old.text} | {new.text} | {new.goal} |")
    return "\n".join(lines)


def outliers(house: House, prefixes: Sequence[str]) -> Iterator[str]:
    """What stands out below any of the given paths, one line each."""

    def below(where: str) -> bool:
        return any(where.startswith(prefix) for prefix in prefixes)

    yield from (
        f"file of {n} lines: {p}"
        for p, n in house.file_lines.items()
        if n > LONGEST_FILE and below(p)
    )
    yield from (
        f"function of {n} lines: {where}"
        for where, n in house.function_lines.items()
        if n > 50 and below(where)
    )
    yield from (f"vague name: {where}" for where in house.vague if below(where))
    yield from (f"short Args entry: {where}" for where in house.short_arguments if below(where))
    yield from (f"no test file of this name: {p}" for p in house.untested_names if below(p))
    names = {w: n for w, n in house.function_names.items() if below(w)}
    single = [where for where, name in names.items() if words_of(name) == 1]
    yield f"function names of one word: {percentage('', len(single), len(names)).text} %"
    yield from (f"  {where}" for where in single)


def main() -> None:
    """Print the table, or what stands out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--before", type=Path, metavar="DIR", help="another tree to compare with")
    parser.add_argument("--list", nargs="+", metavar="PATH", help="print what stands out there")
    arguments = parser.parse_args()
    sys.setrecursionlimit(10_000)
    house = measure(arguments.tree)
    if arguments.before:
        print(compare(measure(arguments.before), house))
        return
    if arguments.list:
        print("\n".join(outliers(house, arguments.list)))
        return
    for row in table(house):
        missed = "" if row.is_met else "  missed"
        print(f"{row.name:34} {row.text:>16}   {row.goal}{missed}")


if __name__ == "__main__":
    main()
