"""The rules for layers, imports and signatures.

They are checked on this project, and then on tiny packages, each of which breaks one rule.
"""

import configparser
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from benchmarks import structure

REPOSITORY = pathlib.Path(__file__).parent.parent


def contracts():
    """The names of the import-linter contracts in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    prefix = "importlinter:contract:"
    return [name.removeprefix(prefix) for name in config.sections() if name.startswith(prefix)]


def lint(folder, *contracts):
    """Whether a checkout keeps the contracts of import-linter, and the report of import-linter."""
    command = [pathlib.Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    for contract in contracts:
        command += ["--contract", contract]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def modules():
    return structure.read_modules(REPOSITORY)


@pytest.fixture(scope="module")
def graph(modules):
    return structure.import_graph(modules)


@pytest.mark.parametrize("contract", contracts())
def test_contract(contract):
    is_kept, report = lint(REPOSITORY, contract)
    assert is_kept, report


def test_diffusion_imports_nothing_but_jax_numpy_and_jaxtyping(modules):
    library = [module for name, module in modules.items() if ".diffusion." in name]
    assert library
    names = {name for module in library for name in structure.imported_names(module, modules)}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert packages <= {"jax", "numpy", "jaxtyping", "diffusion_jax"}
    ours = {name for name in names if name.startswith("diffusion_jax.")}
    assert {structure.folder_of(name) for name in ours} <= {"diffusion", "errors"}


def test_argv_is_read_by_main_alone(modules):
    readers = set(structure.readers_of_argv(modules))
    assert "diffusion_jax.__main__" in readers
    assert readers <= {"main", "diffusion_jax.__main__"}


def test_keys_are_made_of_seeds_in_one_place():
    makers = re.compile(r"random\.(key|PRNGKey|wrap_key_data)\(|default_prng_impl\b")
    files = (REPOSITORY / "diffusion_jax").rglob("*.py")
    made = {path.name for path in files if makers.search(path.read_text())}
    assert made == {"streams.py", "numerics.py"}  # numerics.py sets the default generator


def test_imports_go_down(graph):
    assert structure.against_layers(graph) == []


def test_no_import_cycles(graph):
    assert structure.find_cycles(graph) == []
    assert structure.find_cycles(structure.folder_graph(graph)) == []


def test_longest_chain_of_imports(graph):
    chain = structure.longest_chain(graph)
    assert len(chain) <= structure.MAX_CHAIN, chain


def test_floors_between_the_folders(graph):
    floors = structure.longest_chain(structure.folder_graph(graph))
    assert len(floors) <= structure.MAX_FLOORS, floors


def test_public_functions_take_at_most_five_by_position(modules):
    assert structure.wide_functions(modules) == []


def test_reading_path_is_short():
    lines = structure.reading_lines(REPOSITORY)
    assert sum(lines.values()) < structure.MAX_READING, lines


@pytest.mark.slow  # runs pylint; .ci/run checks it with benchmarks.structure
def test_no_repeated_blocks():
    assert structure.repeated_blocks(REPOSITORY) == []


# --- the rules themselves, on tiny packages ---


def write(folder, files):
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(textwrap.dedent(text))


def tiny(folder, files):
    """Write a package of a few files and return its modules; paths are below diffusion_jax/."""
    write(folder, {"main.py": "", "diffusion_jax/__init__.py": ""})
    write(folder, {f"diffusion_jax/{path}": text for path, text in files.items()})
    return structure.read_modules(folder)


def test_imports_inside_functions_are_followed(tmp_path):
    files = {
        "a.py": "def f():\n    from diffusion_jax import b\n",
        "b.py": "import diffusion_jax.c",
    }
    graph = structure.import_graph(tiny(tmp_path, {**files, "c.py": ""}))
    assert structure.longest_chain(graph) == [f"diffusion_jax.{name}" for name in "abc"]


@pytest.mark.parametrize(
    ("statement", "target"),
    [
        ("from diffusion_jax.pack import part", "pack.part"),  # a module, not a name of __init__
        ("from diffusion_jax.pack import VALUE", "pack"),
        ("from diffusion_jax.pack import train", "pack"),  # a function with its module's name
        ("from diffusion_jax.pack.part import x", "pack.part"),
        ("import diffusion_jax.pack.part", "pack.part"),
        ("from .pack import part", "pack.part"),
        ("from .pack.part import x", "pack.part"),
    ],
)
def test_an_import_counts_for_the_module_or_for_the_package(tmp_path, statement, target):
    face = (
        "from diffusion_jax.pack import part\nfrom diffusion_jax.pack.train import train\nVALUE = 1"
    )
    files = {"pack/__init__.py": face, "pack/part.py": "x = 1", "pack/train.py": "def train(): ..."}
    graph = structure.import_graph(tiny(tmp_path, {**files, "user.py": statement}))
    assert graph["diffusion_jax.user"] == {f"diffusion_jax.{target}"}
    assert graph["diffusion_jax.pack"] == {"diffusion_jax.pack.part", "diffusion_jax.pack.train"}


def test_a_cycle_is_reported_and_counts_as_one_link_of_a_chain(tmp_path):
    files = {
        "top.py": "from diffusion_jax import a",
        "a.py": "from diffusion_jax import b",
        "b.py": "from diffusion_jax import a, ground",
        "ground.py": "",
    }
    graph = structure.import_graph(tiny(tmp_path, files))
    assert structure.find_cycles(graph) == [["diffusion_jax.a", "diffusion_jax.b"]]
    cycle = "diffusion_jax.a = diffusion_jax.b"
    chain = ["diffusion_jax.top", cycle, "diffusion_jax.ground"]
    assert structure.longest_chain(graph) == chain


def test_floors_are_the_longest_chain_of_folders(tmp_path):
    files = {
        "errors.py": "",
        "diffusion/one.py": "from diffusion_jax.diffusion import two",
        "diffusion/two.py": "from diffusion_jax import errors",
        "models/unet.py": "from diffusion_jax.diffusion import one",
        "commands.py": "from diffusion_jax.models import unet",
    }
    folders = structure.folder_graph(structure.import_graph(tiny(tmp_path, files)))
    assert structure.longest_chain(folders) == ["commands", "models", "diffusion"]
    assert structure.find_cycles(folders) == []
    # Modules without a cycle can still form a cycle of folders
    files = {"models/mlp.py": "", "diffusion/two.py": "from diffusion_jax.models import mlp"}
    graph = structure.import_graph(tiny(tmp_path, files))
    assert structure.find_cycles(graph) == []
    assert structure.find_cycles(structure.folder_graph(graph)) == [["diffusion", "models"]]


@pytest.mark.parametrize(
    ("importer", "imported", "goes_down"),
    [
        ("diffusion/x.py", "errors.py", True),
        ("models/x.py", "diffusion/y.py", True),
        ("training/x.py", "training/y.py", True),
        ("ablation/x.py", "diffusion/y.py", True),
        ("errors.py", "diffusion/y.py", False),
        ("experiment/x.py", "training/y.py", False),
        ("data/x.py", "runtime/y.py", False),  # the same layer
        ("training/x.py", "helpers/y.py", False),  # helpers is in no layer
    ],
)
def test_only_an_import_that_goes_down_keeps_the_layers(tmp_path, importer, imported, goes_down):
    name = f"diffusion_jax.{imported.removesuffix('.py').replace('/', '.')}"
    graph = structure.import_graph(tiny(tmp_path, {importer: f"import {name}", imported: ""}))
    assert (structure.against_layers(graph) == []) == goes_down


def test_parameters_are_counted(tmp_path):
    code = """
        def wide(a, b, c, d, e, f): ...
        def keywords(a, b, c, d, e, *, f): ...
        def _private(a, b, c, d, e, f): ...
        def outer():
            def inner(a, b, c, d, e, f): ...
        class Public:
            def __init__(self, a, b, c, d, e, f): ...
            def five(self, a, b, c, d, e): ...
            def six(self, a, b, c, /, d, e, f=0): ...
            @staticmethod
            def alone(a, b, c, d, e, f): ...
            @classmethod
            def create(cls, a, b, c, d, e): ...
        class _Private:
            def six(self, a, b, c, d, e, f): ...
        """
    wide = structure.wide_functions(tiny(tmp_path, {"code.py": code}))
    names = ["wide", "Public.six", "Public.alone"]
    assert [(each.name, each.parameters) for each in wide] == [
        (f"diffusion_jax.code: {name}", 6) for name in names
    ]


def test_lines_of_functions_are_counted(tmp_path):
    body = "    x = 1\n" * structure.MAX_LINES
    code = f"@decorator\ndef over():\n{body}\ndef at():\n{body[10:]}"
    (over,) = structure.long_functions(tiny(tmp_path, {"code.py": code}))
    assert (over.name, over.lines) == ("diffusion_jax.code: over", structure.MAX_LINES + 1)


@pytest.mark.parametrize(
    "code",
    [
        *("import sys\nprint(sys.argv)", "from sys import argv", "def main(argv): ..."),
        *("import argparse", "from absl import flags"),
    ],
)
def test_a_module_that_reads_argv_is_reported(tmp_path, code):
    modules = tiny(
        tmp_path, {"reader.py": code, "other.py": "import sys\nfrom absl import logging"}
    )
    assert structure.readers_of_argv(modules) == ["diffusion_jax.reader"]


def test_a_repeated_block_is_reported(tmp_path):
    lines = [f"value_{index} = {index} + 1\n" for index in range(structure.REPEATED_LINES + 1)]
    tiny(tmp_path, {"a.py": "".join(lines), "b.py": "".join(lines[1:])})
    assert (
        structure.repeated_blocks(tmp_path) == []
    )  # six equal lines: pylint reports more than six
    tiny(tmp_path, {"b.py": "".join(lines)})
    (message,) = structure.repeated_blocks(tmp_path)
    assert "diffusion_jax.a:[0:7]" in message
    signature = "def f(\n" + "".join(f"    argument_{index},\n" for index in range(7)) + "): ...\n"
    tiny(tmp_path, {"a.py": f"{signature}f(1)", "b.py": f"{signature}f(2)"})
    (message,) = structure.repeated_blocks(tmp_path)
    assert "argument_6" in message


def test_repeated_blocks_fail_if_pylint_cannot_parse_a_file(tmp_path):
    write(tmp_path, {"main.py": "", "diffusion_jax/a.py": "def ("})
    with pytest.raises(RuntimeError, match="pylint did not run"):
        structure.repeated_blocks(tmp_path)


def test_main_prints_a_table_of_the_counts(tmp_path, capsys):
    tiny(tmp_path, {"commands.py": "from diffusion_jax import errors", "errors.py": ""})
    for path in structure.READING_PATH:
        write(tmp_path, {path: "x = 1\n"})
    structure.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert f"lines of the reading path{len(structure.READING_PATH):>35}  under" in printed


# --- the contracts, on a tiny package with all folders ---


FOLDERS = (
    *("diffusion", "models", "config", "data", "runtime", "drawing", "experiment", "sampling"),
    *("evaluation", "training", "ablation"),
)
KEPT = {
    "errors.py": "",
    "diffusion/losses.py": "import jax, numpy, jaxtyping, math\nfrom diffusion_jax import errors",
    "models/unet.py": "import flax.nnx\nfrom diffusion_jax.diffusion import losses",
    "config/load.py": "import ml_collections",
    "data/prepared.py": "from absl import logging\nimport tensorflow_datasets",
    "experiment/schedule.py": "import ml_collections\nfrom diffusion_jax.models import unet",
    "ablation/grid.py": "import ml_collections\nfrom diffusion_jax.experiment import schedule",
    "commands.py": "import ml_collections, absl\nfrom diffusion_jax.ablation import grid",
    "__main__.py": "import argparse\nfrom absl import flags\nfrom diffusion_jax import commands",
}


def tiny_layers(folder, files):
    """Write a tiny package that keeps every contract, plus some files of its own."""
    faces = {f"{name}/__init__.py": "" for name in FOLDERS}
    tiny(folder, {**faces, **KEPT, **files})
    shutil.copy(REPOSITORY / "setup.cfg", folder)


def test_contracts_are_kept_by_a_tiny_package(tmp_path):
    tiny_layers(tmp_path, {})
    is_kept, report = lint(tmp_path)
    assert is_kept, report
    assert f"{len(contracts())} kept" in report


@pytest.mark.parametrize(
    ("contract", "path", "code"),
    [
        ("layers", "errors.py", "from diffusion_jax.diffusion import losses"),
        ("layers", "diffusion/x.py", "from diffusion_jax import models"),
        ("layers", "diffusion/x.py", "def f():\n    from diffusion_jax.config import load"),
        ("layers", "models/x.py", "from diffusion_jax import config"),
        ("layers", "runtime/x.py", "from diffusion_jax import experiment"),
        ("layers", "experiment/x.py", "from diffusion_jax import sampling"),
        ("layers", "sampling/x.py", "from diffusion_jax import evaluation"),
        ("layers", "evaluation/x.py", "from diffusion_jax import training"),
        ("layers", "training/x.py", "from diffusion_jax import ablation"),
        ("layers", "ablation/x.py", "from diffusion_jax import commands"),
        ("layers", "commands.py", "from diffusion_jax import __main__"),
        ("layers", "helpers.py", ""),  # in no layer
        ("diffusion", "diffusion/x.py", "import scipy.special"),
        ("diffusion", "diffusion/samplers/x.py", "def f():\n    import flax"),
        ("flax", "training/x.py", "from flax import nnx"),
        ("ml_collections", "models/x.py", "from ml_collections import ConfigDict"),
        ("ml_collections", "ablation/x.py", "import ml_collections"),
        ("argv", "config/x.py", "import argparse"),
        ("argv", "commands.py", "def f():\n    from optparse import OptionParser"),
        ("absl", "config/x.py", "from absl import flags"),
    ],
)
def test_a_broken_contract_is_reported(tmp_path, contract, path, code):
    tiny_layers(tmp_path, {"diffusion/samplers/__init__.py": "", path: code})
    is_kept, report = lint(tmp_path, contract)
    assert not is_kept
    assert "BROKEN" in report, report


def test_every_contract_is_broken_by_a_case():
    marks = test_a_broken_contract_is_reported.pytestmark
    assert {case[0] for case in marks[0].args[1]} == set(contracts())
