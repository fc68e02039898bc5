"""Execute the notebooks of the tutorials.

    python docs/notebooks.py                 # all of them, in place
    python docs/notebooks.py FILE.ipynb …    # some of them

Outputs are stored in the files, without times, versions of Python and other metadata that change
from run to run. `tests/test_notebooks.py` checks the stored outputs; `make test-notebooks` executes
the notebooks again.
"""

from __future__ import annotations

import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence

import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent / "tutorials"
_LIMIT = 900  # seconds for one cell, on a busy machine
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def executed(path: pathlib.Path) -> nbformat.NotebookNode:
    """Return a notebook with new outputs; raise `nbclient.exceptions.CellExecutionError`.

    Cells run on the CPU in an empty folder, so they cannot depend on files of this project.
    """
    notebook = nbformat.read(path, as_version=4)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # with libtpu installed JAX looks for a TPU
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # tqdm, where ipywidgets is not installed
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=_LIMIT, kernel_name="python3",
                       resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = without_progress(cell.outputs)
    notebook.metadata = {"kernelspec": dict(_KERNEL), "language_info": {"name": "python"}}
    return notebook


def without_progress(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return the outputs of a cell without displays of progress, each of which rewrites a line."""
    return [one for one in outputs
            if one.get("name") != "stderr" or not "".join(one["text"]).startswith("\r")]


def main(arguments: Sequence[str]) -> None:
    """Execute notebooks in place and print the seconds of each."""
    for path in [pathlib.Path(name) for name in arguments] or sorted(FOLDER.glob("*.ipynb")):
        start = time.perf_counter()
        nbformat.write(executed(path), path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
