"""Hooks of MkDocs: pages that the site makes from files of the repository.

The pages of `docs/` are read on GitHub too, so their links are those of the repository. For the
site, notebooks become Markdown pages with their stored outputs, and the files of `OUTSIDE`, which
lie outside `docs/`, become pages. Links are rewritten accordingly.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import posixpath
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = pathlib.Path(__file__).parents[1]
EXAMPLES = "reference/examples.md"
# file of the repository → page, or picture of a page, of the site
OUTSIDE = {
    "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
    "ckpts/mini/README.md": "reference/mini.md",
    "jaxpersona/data/DATA_CARD.md": "reference/data.md",
    "jaxpersona/data/spread.png": "reference/spread.png",
} | {
    f"examples/{path.name}": EXAMPLES for path in sorted((ROOT / "examples").glob("*.py"))}
_LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook and for each file of `OUTSIDE`."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = file.src_uri.removesuffix(".ipynb") + ".md"
        name = posixpath.basename(file.src_uri)
        note = f'<p><a href="../{name}" download>Download this notebook</a></p>\n\n'
        text, pictures = from_notebook(json.loads(file.content_string), page)
        title, _, rest = text.partition("\n")
        files.append(File.generated(config, page, content=f"{title}\n\n{note}{rest}"))
        for uri, picture in pictures.items():
            files.append(File.generated(config, uri, content=picture))
    for source, page in OUTSIDE.items():
        if not page.endswith(".md"):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
        elif page != EXAMPLES:
            text = linked((ROOT / source).read_text(), posixpath.dirname(source), page)
            files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, EXAMPLES, content=examples()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Rewrite the links of a page of `docs/` to files that the site shows elsewhere."""
    uri = page.file.src_uri
    if page.file.generated_by:
        return markdown
    return linked(markdown, posixpath.join("docs", posixpath.dirname(uri)), uri)


def linked(text: str, folder: str, page: str) -> str:
    """Return Markdown of a file in `folder` with the links that its page of the site needs.

    Args:
      folder: the folder of the text in the repository, which its links are relative to.
      page: the URI of the page in the site.
    """
    def replace(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        place = posixpath.normpath(posixpath.join(folder, target))  # in the repository
        there = OUTSIDE.get(place, place.removeprefix("docs/"))
        if there == EXAMPLES:
            anchor = "#" + posixpath.basename(place).replace(".py", "py")
        if there.endswith(".ipynb"):
            there = there.removesuffix(".ipynb") + ".md"
        relative = os.path.relpath(there, posixpath.dirname(page) or ".")
        return before + pathlib.PurePath(relative).as_posix() + (anchor or "") + after

    return _LINK.sub(replace, text)


def from_notebook(notebook: dict[str, Any], page: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by their URI.

    Links of its Markdown cells are rewritten for the page.
    """
    parts, pictures = [], {}
    stem = page.removesuffix(".md")
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(linked(source, posixpath.join("docs", posixpath.dirname(page)), page))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                uri = f"{stem}-{number}.png"
                pictures[uri] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![output of the cell above]({posixpath.basename(uri)})")
            elif "text/html" in data:  # a table of a result, whose texts are escaped
                parts.append("".join(data["text/html"]))
            elif text.strip():
                parts.append(f"```text\n{_ANSI.sub('', text).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def examples() -> str:
    """Return the page of the scripts in `examples/`."""
    parts = ["# Examples", "Scripts of the folder `examples/`; each runs on the embedded model in "
             "seconds on an idle CPU."]
    for source, page in OUTSIDE.items():
        if page == EXAMPLES:
            name = posixpath.basename(source)
            parts.append(f"## {name}\n\n```python\n{(ROOT / source).read_text().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"
