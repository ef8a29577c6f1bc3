"""The structure of the code: imports, layers, long signatures, long functions, repeated blocks.

    python -m benchmarks.structure                 # this checkout
    python -m benchmarks.structure FOLDER          # another one, for example
    git worktree add ../before 0a48fca && python -m benchmarks.structure ../before

The files are parsed, never imported. They are main.py and the modules of diffusion_jax, without
configs/, which belongs to the user. Definitions:

- Imports count anywhere in a file, also inside functions. `import a.b` is an import of a.b.
  `from a import name` is an import of a.name if that is a module, unless the face of a (its
  __init__.py) binds the name to something else; otherwise it is an import of a.
- The longest chain counts modules, each importing the next. Modules that import each other in a
  cycle count as one, and the cycle is reported.
- A folder is the first part of a name below diffusion_jax; a file there is a folder of its own.
  Floors are the longest chain of folders, without errors.py, which all folders may import.
- An import is against the layers if the imported folder is not in a lower layer (LAYERS).
- A function is public if it is not inside another function, and no part of its name, including its
  classes, starts with "_". Its parameters are counted without self, cls and keyword-only ones.
- The lines of a function are those from its def to its end, with its signature and docstring, but
  without its decorators.
- A repeated block is a match of pylint's duplicate-code in two files, with min-similarity-lines=6:
  more than six lines that are not only brackets. Imports, comments and docstrings are ignored.
  Signatures are not ignored, which is stricter than pylint's default.
"""

import argparse
import ast
import dataclasses
import graphlib
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set

PACKAGE = "diffusion_jax"
LAYERS = (  # the lowest first; the folders of one layer do not import each other
    {"errors"},
    {"diffusion"},
    {"models", "config", "data", "runtime", "drawing"},
    {"experiment"},
    {"sampling", "evaluation"},
    {"training"},
    {"ablation"},
    {"commands"},
    {"__main__"},
    {PACKAGE},  # the package's own face
    {"main"},
)
READING_PATH = (
    "main.py",
    *("diffusion_jax/commands.py", "diffusion_jax/training/train.py"),
    *("diffusion_jax/training/step.py", "diffusion_jax/diffusion/losses.py"),
    *("diffusion_jax/diffusion/process.py", "diffusion_jax/diffusion/schedules/schedule.py"),
    *("diffusion_jax/diffusion/schedules/families.py", "diffusion_jax/models/unet.py"),
)
FLAT_READING_PATH = (  # of revisions without folders
    *("main.py", "diffusion_jax/train.py", "diffusion_jax/losses.py", "diffusion_jax/process.py"),
    *("diffusion_jax/schedules.py", "diffusion_jax/models/unet.py"),
)
MAX_CHAIN, MAX_FLOORS, MAX_PARAMETERS, MAX_LINES, MAX_READING = 20, 8, 5, 60, 1_450
REPEATED_LINES = 6

Graph = Mapping[str, Set[str]]  # from each module or folder to those that it imports


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """One file: its dotted name, its syntax tree, and whether it is the face of a package."""

    name: str
    tree: ast.Module
    is_face: bool

    def resolve(self, node: ast.ImportFrom) -> str:
        """The full name of the module that a `from ... import` imports from."""
        package = self.name if self.is_face else self.name.rpartition(".")[0]
        return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Function:
    """A function or method."""

    name: str  # module: Class.method
    is_public: bool
    parameters: int  # positional ones
    lines: int


def read_modules(folder: pathlib.Path) -> dict[str, Module]:
    """The modules of a checkout, by name."""
    modules = {}
    for path in [folder / "main.py", *sorted((folder / PACKAGE).rglob("*.py"))]:
        parts = path.relative_to(folder).with_suffix("").parts
        is_face = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_face else parts)
        modules[name] = Module(name=name, tree=ast.parse(path.read_text("utf-8")), is_face=is_face)
    return modules


def bound_names(face: Module) -> set[str]:
    """The names that a package's face binds at its top level, its own modules left out."""
    names = set()
    for node in face.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and face.resolve(node) != face.name:
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def imported_names(module: Module, modules: Mapping[str, Module]) -> set[str]:
    """The names of the modules that a module imports, ours and those of other packages."""
    names = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.resolve(node)
            bound = bound_names(modules[base]) if base in modules else set()
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                is_module = submodule in modules and alias.name not in bound
                names.add(submodule if is_module else base)
    return names


def import_graph(modules: Mapping[str, Module]) -> dict[str, set[str]]:
    """Which of our modules each module imports."""
    return {
        name: (imported_names(module, modules) & modules.keys()) - {name}
        for name, module in modules.items()
    }


def folder_of(module: str) -> str:
    """The folder of a module: main, errors, diffusion, ..."""
    return module.split(".")[1] if "." in module else module


def folder_graph(graph: Graph) -> dict[str, set[str]]:
    """Which folder imports which; without errors.py, main.py and the package's face."""
    left_out = {"errors", "main", PACKAGE}
    folders: dict[str, set[str]] = {}
    for module, imported in graph.items():
        folder = folder_of(module)
        if folder not in left_out:
            others = {folder_of(other) for other in imported} - left_out - {folder}
            folders.setdefault(folder, set()).update(others)
    return folders


def reachable(graph: Graph, start: str) -> set[str]:
    """All nodes that a node imports, directly or through others."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


def find_cycles(graph: Graph) -> list[list[str]]:
    """The groups of nodes that import each other, directly or through others."""
    reach = {node: reachable(graph, node) for node in graph}
    groups = {
        frozenset(other for other in reach[node] if node in reach[other])
        for node in graph
        if node in reach[node]
    }
    return sorted(sorted(group) for group in groups)


def longest_chain(graph: Graph) -> list[str]:
    """The longest chain, the importer first; a cycle is one link, its names joined by " = "."""
    link = {node: node for node in graph}
    for cycle in find_cycles(graph):
        link |= dict.fromkeys(cycle, " = ".join(cycle))
    links: dict[str, set[str]] = {}
    for node, imported in graph.items():
        below = {link[other] for other in imported} - {link[node]}
        links.setdefault(link[node], set()).update(below)
    chains: dict[str, list[str]] = {}
    for name in graphlib.TopologicalSorter(links).static_order():
        below = [chains[other] for other in links[name]]
        chains[name] = [name, *max(below, key=lambda chain: (len(chain), chain), default=[])]
    return max(chains.values(), key=lambda chain: (len(chain), chain))


def is_flat(modules: Mapping[str, Module]) -> bool:
    """Whether this is the tree of a revision without layers."""
    return f"{PACKAGE}.diffusion" not in modules


def against_layers(graph: Graph) -> list[str]:
    """The imports that do not go to a lower layer, as "importer -> imported"."""
    height = {folder: floor for floor, folders in enumerate(LAYERS) for folder in folders}

    def goes_down(module: str, other: str) -> bool:
        upper, lower = folder_of(module), folder_of(other)
        is_known = {upper, lower} <= height.keys()
        return upper == lower or (is_known and height[lower] < height[upper])

    return [
        f"{module} -> {other}"
        for module, imported in graph.items()
        for other in sorted(imported)
        if not goes_down(module, other)
    ]


def functions(modules: Mapping[str, Module]) -> list[Function]:
    """All functions and methods, nested ones included."""

    def visit(node: ast.AST, names: tuple[str, ...], is_local: bool) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, (*names, child.name), is_local)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                own = (*names, child.name)
                decorators = {ast.unparse(decorator) for decorator in child.decorator_list}
                has_self = isinstance(node, ast.ClassDef) and "staticmethod" not in decorators
                is_private = is_local or any(name.startswith("_") for name in own[1:])
                parameters = len(child.args.posonlyargs + child.args.args) - has_self
                lines = (child.end_lineno or child.lineno) - child.lineno + 1
                name = f"{own[0]}: {'.'.join(own[1:])}"
                yield Function(
                    name=name, is_public=not is_private, parameters=parameters, lines=lines
                )
                yield from visit(child, own, is_local=True)
            else:
                yield from visit(child, names, is_local)

    return [
        function
        for module in modules.values()
        for function in visit(module.tree, (module.name,), is_local=False)
    ]


def wide_functions(modules: Mapping[str, Module]) -> list[Function]:
    """Public functions with more than five positional parameters."""
    return [
        function
        for function in functions(modules)
        if function.is_public and function.parameters > MAX_PARAMETERS
    ]


def long_functions(modules: Mapping[str, Module]) -> list[Function]:
    """Functions over 60 lines, public or not."""
    return [function for function in functions(modules) if function.lines > MAX_LINES]


def reading_lines(folder: pathlib.Path) -> dict[str, int]:
    """The lines of each file of the reading path."""
    paths = READING_PATH if (folder / READING_PATH[1]).exists() else FLAT_READING_PATH
    return {path: len((folder / path).read_text("utf-8").splitlines()) for path in paths}


def readers_of_argv(modules: Mapping[str, Module]) -> list[str]:
    """The modules that contain the name argv, or import a parser of command lines."""
    argv = {"argv", "sys.argv", "argparse", "getopt", "optparse", "absl.app", "absl.flags"}
    readers = []
    for name, module in modules.items():
        words: set[str | None] = set()
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom):
                words |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.alias):
                words.add(node.name)
            else:  # a name, a parameter, an attribute
                words |= {getattr(node, field, None) for field in ("id", "arg", "attr")}
        if words & argv:
            readers.append(name)
    return readers


def repeated_blocks(folder: pathlib.Path) -> list[str]:
    """The messages of pylint's duplicate-code: the two places of each block, then its lines.

    Raises:
        RuntimeError: pylint is not installed, or a file cannot be parsed.
    """
    paths = [folder / "main.py", *sorted((folder / PACKAGE).rglob("*.py"))]
    options = (
        *("--rcfile=/dev/null", "--persistent=n", "--disable=all", "--enable=duplicate-code"),
        *(f"--min-similarity-lines={REPEATED_LINES}", "--ignore-imports=y", "--ignore-comments=y"),
        *("--ignore-docstrings=y", "--ignore-signatures=n", "--output-format=json"),
    )
    answer = subprocess.run(
        [sys.executable, "-m", "pylint", *options, *(path.relative_to(folder) for path in paths)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,  # its exit status is not 0 if there are blocks
    )
    if not answer.stdout.startswith("["):
        raise RuntimeError(f"pylint did not run: {answer.stderr}")
    messages = json.loads(answer.stdout)
    failures = [each["message"] for each in messages if each["symbol"] != "duplicate-code"]
    if failures:  # a file that cannot be parsed, for example
        raise RuntimeError(f"pylint did not run: {failures}")
    return [message["message"] for message in messages]


def main(argv: list[str]) -> int:
    """Print a row for each number, then its details; the exit status is 1 if a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structure")
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=pathlib.Path.cwd())
    parser.add_argument("--verbose", action="store_true", help="show the repeated blocks")
    arguments = parser.parse_args(argv)

    modules = read_modules(arguments.folder)
    graph = import_graph(modules)
    folders = folder_graph(graph)
    chain, floors = longest_chain(graph), longest_chain(folders)
    against = [] if is_flat(modules) else against_layers(graph)
    num_against = "no layers" if is_flat(modules) else len(against)
    cycles = [" = ".join(cycle) for cycle in find_cycles(graph) + find_cycles(folders)]
    wide = [f"{each.parameters:4} {each.name}" for each in wide_functions(modules)]
    long = [f"{each.lines:4} {each.name}" for each in long_functions(modules)]
    reading = reading_lines(arguments.folder)
    files = [f"{lines:4} {path}" for path, lines in reading.items()]
    blocks = repeated_blocks(arguments.folder)
    shown_blocks = blocks if arguments.verbose else []

    rows = (  # name, number, limit, details that are printed below the table
        ("modules", len(modules), "", []),
        ("longest chain of imports", len(chain), f"at most {MAX_CHAIN}", chain),
        ("floors between the folders", len(floors), f"at most {MAX_FLOORS}", floors),
        ("import cycles, of modules or folders", len(cycles), "0", cycles),
        ("imports against the layers", num_against, "0", against),
        (f"public functions, over {MAX_PARAMETERS} positional parameters", len(wide), "0", wide),
        (f"functions over {MAX_LINES} lines", len(long), "", long),
        (f"repeated blocks, min-similarity-lines={REPEATED_LINES}", len(blocks), "0", shown_blocks),
        ("lines of the reading path", sum(reading.values()), f"under {MAX_READING}", files),
    )
    for name, number, limit, _ in rows:
        print(f"{name:50}{number:>10}  {limit}".rstrip())
    for name, _, _, items in rows:
        if items:
            print(f"\n{name}:", *(f"    {item}" for item in items), sep="\n")
    too_long = len(chain) > MAX_CHAIN or len(floors) > MAX_FLOORS
    too_long |= sum(reading.values()) >= MAX_READING
    return int(too_long or bool(cycles or against or wide or blocks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
