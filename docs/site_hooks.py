"""Hooks that add pages, links and formulas to the site that mkdocs builds.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages, although they are not in docs/. A link to
a file of the repository leads to a page with the text of that file. Formulas become MathML, with a
font that is part of the site, so that they need no script and no network. A link to a missing file
does not change, and mkdocs reports it.
"""

import html
import importlib.util
import os
import posixpath
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
ABOVE_DOCS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\]\(([^()\s#:]+)(#[^()\s]*)?\)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
FORMULA_OF_TITLE = re.compile(r"()\\\((.*?)\\\)")
FUNCTION = re.compile(r"\\(?:(?:sin|cos|tan)h?|log|ln)(?![a-z])(?:\^\w)?(?:\s*(\())?")
FONT = Path(importlib.util.find_spec("ziamath").origin).parent / "fonts/STIXTwoMath-Regular.ttf"
LANGUAGES = {".py": "python", ".json": "json", ".ipynb": "json", ".cfg": "ini"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are not in docs/, and a page for each linked file of the repository."""
    for name in ABOVE_DOCS:
        files.append(File.generated(config, name, content=(REPOSITORY / name).read_text()))
    files.append(File.generated(config, "STIXTwoMath.ttf", abs_src_path=str(FONT)))
    waiting = [path for file in files.documentation_pages() for path in _linked(file)]
    while waiting:
        path = waiting.pop()
        uri = _uri(path)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, content=_text(path)))
            waiting += sorted(path.glob("*.py"))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replaces each link to a file of the repository by a link to its page."""
    here = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        path = _target(page.file, match[1])
        if path is None:
            return match[0]
        return f"]({posixpath.relpath(_uri(path), here or '.')}{match[2] or ''})"

    return LINK.sub(replace, markdown)


def on_page_content(html_text: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Converts the TeX of the formulas to MathML, which browsers can display."""
    titles = list(page.toc)
    for title in titles:  # the loop also visits the children that it appends
        title.title = FORMULA_OF_TITLE.sub(_mathml, title.title)
        titles += title.children
    return FORMULA.sub(_mathml, html_text)


def _mathml(formula: re.Match[str]) -> str:
    """The MathML of a formula: display style in a div, inline style in a span."""
    display = "block" if formula[1] == "div" else "inline"
    tex = html.unescape(formula[2]).strip()
    # like TeX: a thin space on both sides of a function's name, but none before a bracket
    tex = FUNCTION.sub(lambda name: f"\\,{name[0]}" + ("" if name[1] else "\\,"), tex)
    mathml = latex2mathml.converter.convert(tex, display=display)
    return mathml.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')


def _linked(file: File) -> list[Path]:
    """The files of the repository that a page links to."""
    targets = (_target(file, match[1]) for match in LINK.finditer(file.content_string))
    return [path for path in targets if path is not None and _uri(path).startswith("source/")]


def _target(file: File, link: str) -> Path | None:
    """The file of the repository that a link leads to, or None."""
    if file.src_uri.startswith("source/"):
        return None
    folder = REPOSITORY if file.src_uri in ABOVE_DOCS else DOCS / posixpath.dirname(file.src_uri)
    path = Path(os.path.normpath(folder / link))
    return path if path.exists() and path.is_relative_to(REPOSITORY) else None


def _uri(path: Path) -> str:
    """The path of a file's page in the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(REPOSITORY).as_posix()
    return name if name in ABOVE_DOCS else f"source/{name}.md"


def _text(path: Path) -> str:
    """The Markdown text of the page of a file or folder of the repository."""
    name = path.relative_to(REPOSITORY).as_posix()
    if path.is_dir():
        entries = (f"- [{entry.name}]({path.name}/{entry.name}.md)" for entry in path.glob("*.py"))
        return "\n".join([f"# {name}", "", *sorted(entries), ""])
    language = LANGUAGES.get(path.suffix, "text")
    return f"# {name}\n\n````` {language}\n{path.read_text()}\n`````\n"
