"""The documentation site: its pages, its reference, the hooks that make pages, and CITATION.cff."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import pathlib
import re
import shutil

import pytest
import yaml

import jaxpersona as jp

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
ENTRY = re.compile(r"^::: jaxpersona\.([\w.]+)$", re.MULTILINE)


class _Loader(yaml.SafeLoader):
    """A loader that reads tags of Python objects, such as the slug function, as None."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()


def pages(nav) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [page for item in (nav.values() if isinstance(nav, dict) else nav)
            for page in pages(item)]


def test_the_navigation_has_every_page_once():
    listed = pages(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])
    files = {p.relative_to(DOCS).with_suffix(".md").as_posix()
             for kind in ("*.md", "*.ipynb") for p in DOCS.rglob(kind)}
    assert len(listed) == len(set(listed))
    made = {page for page in HOOKS.OUTSIDE.values() if page.endswith(".md")}
    assert set(listed) == files | made


def resolved(name: str):
    """The object `jaxpersona.<name>`."""
    parts = name.split(".")
    for count in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["jaxpersona", *parts[:count]]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise AssertionError(name)


def test_the_reference_has_every_public_name_once():
    text = "\n".join(p.read_text() for p in sorted((DOCS / "reference").glob("*.md")))
    entries = ENTRY.findall(text)
    assert len(entries) == len(set(entries))
    for name in entries:
        assert resolved(name).__doc__, name
    selectors = {name for name in jp.__all__ if isinstance(getattr(jp, name), jp.Where)}
    assert all(f"`jp.{name}`" in text for name in selectors)
    modules = {"capture", "plot", "where"}
    assert {name for name in jp.__all__} == (
        {name for name in entries if "." not in name} | selectors | modules)
    assert {f"capture.{name}" for name in jp.capture.__all__ if name != "chosen_layers"} == {
        name for name in entries if name.startswith("capture.")}
    assert {f"plot.{name}" for name in jp.plot.__all__} == {
        name for name in entries if name.startswith("plot.")}


@pytest.mark.parametrize(("text", "folder", "page", "wanted"), [
    ("[a](../CHANGELOG.md)", "docs/", "index.md", "[a](changelog.md)"),
    ("[a](../../CHANGELOG.md#x)", "docs/howto", "howto/a.md", "[a](../changelog.md#x)"),
    ("[a](docs/library.md#letters)", "", "contributing.md", "[a](library.md#letters)"),
    ("[a](../examples/interventions.py)", "docs/", "library.md",
     "[a](reference/examples.md#interventionspy)"),
    ("[a](tutorials/1.ipynb)", "docs/", "index.md", "[a](tutorials/1.md)"),
    ("![a](spread.png)", "jaxpersona/data", "reference/data.md", "![a](spread.png)"),
    ("![p](results/p.png)", "docs/", "index.md", "![p](results/p.png)"),
    ("[a](#here) and [b](https://example.org/x.md)", "docs/", "index.md",
     "[a](#here) and [b](https://example.org/x.md)"),
])
def test_links_of_the_repository_become_links_of_the_site(text, folder, page, wanted):
    assert HOOKS.linked(text, folder, page) == wanted


def test_a_notebook_becomes_a_page_with_its_outputs():
    notebook = {"cells": [
        {"cell_type": "markdown", "source": ["# Title\n", "\n", "[x](../limits.md)"]},
        {"cell_type": "code", "source": ["1 + 1"], "outputs": [
            {"data": {"text/plain": ["2"]}}, {"data": {"image/png": "aGk=", "text/plain": "<F>"}},
            {"data": {"text/html": ["<div>t</div>"], "text/plain": ["T(1)"]}},
            {"text": ["a\n", "\x1b[1mb\x1b[0m\n"]}]}]}
    text, pictures = HOOKS.from_notebook(notebook, "tutorials/t.md")
    assert text == ("# Title\n\n[x](../limits.md)\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n\n"
                    "![output of the cell above](t-1.png)\n\n<div>t</div>\n\n```text\na\nb\n```\n")
    assert pictures == {"tutorials/t-1.png": b"hi"}


def test_citation_file():
    """The fields that the Citation File Format 1.2.0 requires, and this version."""
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert found["cff-version"] == "1.2.0" and found["message"] and found["title"]
    assert found["type"] == "software" and found["license"] == "Apache-2.0"
    assert found["version"] == jp.__version__
    datetime.date.fromisoformat(found["date-released"])
    (article,) = found["references"]
    people = [*found["authors"], *article["authors"]]
    assert all("name" in one or {"family-names", "given-names"} <= set(one) for one in people)
    assert article["title"] in " ".join((ROOT / "README.md").read_text().split())
    assert article["title"].endswith("the Default Persona of Language Models")
    assert [one["family-names"] for one in article["authors"]] == [
        "Lu", "Gallagher", "Michala", "Fish", "Lindsey"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """`make docs`: MkDocs checks links and anchors, and mkdocstrings finds every name."""
    pytest.importorskip("mkdocstrings")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    package = tmp_path / "types" / "jaxpersona"
    shutil.copytree(ROOT / "jaxpersona", package)
    for name in ("kernels", "ckpts"):
        shutil.copytree(ROOT / name, package / name)
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    assert config.strict
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(package.parent)]
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # strict: a warning raises
    page = (tmp_path / "site" / "reference" / "generation" / "index.html").read_text()
    assert 'id="jaxpersona.generate"' in page and "max_new_tokens" in page
    page = (tmp_path / "site" / "tutorials" / "1-read-and-hold-a-persona" / "index.html")
    assert 'href="../../results/real-models/"' in page.read_text()
