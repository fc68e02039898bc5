"""README and docs: Python blocks run, links resolve, and the README is short."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import re

import pytest

from jaxpersona.organism import judge

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
          *sorted((ROOT / "docs").rglob("*.ipynb"))]
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
# blocks that need several devices or a model from the hub
NOT_RUN = {"docs/meshes.md": "make_mesh(data=2, model=8)"}


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
        if target.startswith(("http://", "https://")):
            continue
        file, _, heading = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name(path)} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", prose(found), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert heading in slugs, f"{name(path)} links to {target}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 800  # with code, as `wc -w` counts
