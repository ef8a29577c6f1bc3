"""Public names have docstrings, links lead to files, and the guide names every choice."""

import ast
import pathlib
import re

import pytest

from diffusion_jax.diffusion.parametrisations import PREDICTIONS
from diffusion_jax.diffusion.samplers import SAMPLERS
from diffusion_jax.diffusion.schedules import SCHEDULES
from diffusion_jax.diffusion.timesteps import TIMESTEP_SAMPLERS
from diffusion_jax.diffusion.variances import VARIANCES
from diffusion_jax.diffusion.weightings import WEIGHTINGS

REPOSITORY = pathlib.Path(__file__).parent.parent
PACKAGE = REPOSITORY / "diffusion_jax"
DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted(DOCS.rglob("*.md"))
GUIDE = (DOCS / "guide.md").read_text()
CODE = re.compile(r"^(`{3,}).*?^\1$|^ {4}.*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def undocumented(module, name=""):
    """The public modules, classes, functions, methods and properties without a docstring."""
    if (name or module.body) and ast.get_docstring(module) is None:
        yield name or "module"
    for node in module.body:
        kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if not isinstance(node, kinds) or node.name.startswith("_"):
            continue
        inner = f"{name}.{node.name}".lstrip(".")
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node, inner)
        elif ast.get_docstring(node) is None and not is_overload(node):
            yield inner


def is_overload(function):
    """Whether a function only declares one of several signatures."""
    return any(ast.unparse(decorator) == "overload" for decorator in function.decorator_list)


def broken(page, text):
    """The relative links of a page that lead to no file; links inside code do not count."""
    links = re.findall(r"\]\(([^()\s]+)\)", CODE.sub("", text))
    paths = [link.split("#")[0] for link in links if "://" not in link]
    return [path for path in paths if path and not (page.parent / path).exists()]


def public_modules(folder):
    """The Python files of a folder whose names do not begin with "_", and every __init__.py."""
    files = sorted(folder.rglob("*.py"))
    assert files
    return [file for file in files if not file.name.startswith("_") or file.name == "__init__.py"]


def test_every_public_name_has_a_docstring():
    missing = {
        str(file.relative_to(REPOSITORY)): names
        for file in public_modules(PACKAGE)
        if (names := list(undocumented(ast.parse(file.read_text()))))
    }
    assert missing == {}


def test_a_name_without_a_docstring_is_found():
    text = """
'''A module.'''
class Public:
    def method(self): ...
    def _hidden(self): ...
    @property
    def width(self): ...
    class Inner:
        '''Documented.'''
        async def run(self): ...
class _Hidden:
    def method(self): ...
def function():
    '''Documented.'''
    def inner(): ...
def other(): ...
"""
    names = ["Public", "Public.method", "Public.width", "Public.Inner.run", "other"]
    assert list(undocumented(ast.parse(text))) == names
    assert list(undocumented(ast.parse("x = 1"))) == ["module"]
    assert list(undocumented(ast.parse(""))) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files(page):
    assert broken(page, page.read_text()) == []


def test_a_broken_link_is_found():
    text = """
[here](README.md) [there](docs/guide.md#train) [web](https://example.org/none.md) [part](#speed)
`[code](none.md)` [broken](docs/none.md) ![picture](none.png)

    [indented code](none.md)

```python
[fenced code](none.md)
```
"""
    assert broken(REPOSITORY / "README.md", text) == ["docs/none.md", "none.png"]


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("schedule.name", SCHEDULES),
        ("sampling.sampler", SAMPLERS),
        ("loss.weighting", WEIGHTINGS),
        ("loss.prediction", PREDICTIONS),
        ("loss.variance", VARIANCES),
        ("loss.timesteps", TIMESTEP_SAMPLERS),
    ],
)
def test_the_guide_names_every_choice(field, choices):
    (row,) = re.findall(rf"^\| `{field}` \|(.*)\|$", GUIDE, re.MULTILINE)
    assert set(choices) <= set(re.findall(r"`(\w+)`", row))


def test_the_reference_has_every_module_of_the_library():
    pages = "\n".join(page.read_text() for page in sorted((DOCS / "reference").glob("*.md")))
    named = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(named) == len(set(named))
    files = [file for file in public_modules(PACKAGE / "diffusion") if file.name != "__init__.py"]
    modules = {".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files}
    assert modules <= set(named)
