"""README and docs: Python blocks run, links resolve, and the README is short."""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import json
import pathlib
import re
import socket
import urllib.parse
import urllib.request

import pytest

from jaxpersona.organism import judge

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
          *sorted((ROOT / "docs").rglob("*.ipynb"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# blocks that need several devices or a model from the hub
NOT_RUN = {"docs/meshes.md": "make_mesh(data=2, model=8)",
           "docs/howto/many-hosts.md": "processes.start("}


def name(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: pathlib.Path) -> list[str]:
    """Return the Python blocks of a page, except those in `NOT_RUN`."""
    skipped = NOT_RUN.get(name(path))
    found = FENCE.findall(path.read_text())
    assert skipped is None or any(skipped in block for block in found)
    return [block for block in found if skipped is None or skipped not in block]


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p)], ids=name)
def test_the_blocks_of_a_page_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "__main__"}
    out = io.StringIO()
    for number, block in enumerate(blocks(path)):
        with contextlib.redirect_stdout(out):
            exec(compile(block, f"{name(path)}, block {number}", "exec"), space)
    if path.name == "README.md":
        plain, capped, *swept = [line for line in out.getvalue().splitlines() if line]
        projections = [float(line.split()[1]) for line in (plain, capped)]
        # the replies are read again without the cap, so its floor says nothing about them
        assert projections[0] + 3 < projections[1]
        styles = [judge.style(text) for text in (plain.split(None, 2)[2], capped.split(None, 2)[2],
                                                 *swept)]
        assert styles[0] > 0.5 > styles[1] and styles[2] < 0.5 < styles[4]
        assert all(judge.recognised(text) > 0.5 for text in swept)  # steered replies are still text
        shown = path.read_text().split("It prints (shortened):")[1].split("\n\n")[1]
        assert len(shown.splitlines()) == len(swept) + 2


@pytest.mark.parametrize("page", NOT_RUN)
def test_blocks_that_do_not_run_here_define_what_they_use(page):
    """Every name is assigned before it is read, and attributes of modules and models exist."""
    found = FENCE.findall((ROOT / page).read_text())
    (block,) = [block for block in found if NOT_RUN[page] in block]
    space: dict[str, object] = {}
    known = set(dir(builtins))
    for statement in ast.parse(block).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert read <= known, f"{page} reads {sorted(read - known)}"
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            exec(ast.unparse(statement), space)
            known |= set(space)
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = space.get(node.value.id)
            assert module is None or hasattr(module, node.attr), ast.unparse(node)


def test_python_is_fenced_and_not_indented():
    """An indented block would not be run by the test above."""
    for path in PAGES:
        assert not re.search(r"^ {4}(import|from) \w+", prose(path), re.MULTILINE), name(path)


def prose(path: pathlib.Path) -> str:
    """The text of a page without code, or that of a notebook's Markdown cells."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        text = "\n\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]
                           if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", LINKED, ids=name)
def test_every_link_leads_to_a_file_and_a_heading(path):
    text = prose(path)
    assert not re.search(r"\]\[", text), "write links as [text](target), which is checked"
    for target in re.findall(r"\]\(([^)]*)\)", text):
        assert target and not re.search(r"\s", target), f"{name(path)} links to {target!r}"
        assert not target.startswith("http://"), f"{name(path)}: use https for {target}"
        if target.startswith("https://"):
            continue
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name(path)} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", prose(found), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in slugs, f"{name(path)} links to {target}"


def test_a_page_begins_with_its_title():
    for path in PAGES:
        assert path.read_text().startswith("# "), name(path)


ADDRESSES = sorted({target for path in LINKED
                    for target in re.findall(r"\]\((https://[^)]*)\)", prose(path))})


@pytest.mark.real
@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_answers(address):
    host = urllib.parse.urlsplit(address).hostname
    try:
        socket.getaddrinfo(host, 443)
    except socket.gaierror as error:
        pytest.skip(f"the name {host} cannot be resolved: {error}")
    request = urllib.request.Request(address, headers={"User-Agent": "jaxpersona tests"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 800  # with code, as `wc -w` counts
