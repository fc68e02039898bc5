"""The tutorials: stored outputs are complete and free of this machine; `slow` executes them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import jaxpersona as jp

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|usr|opt|Users|var|mnt)/|[A-Z]:\\\\|File \"")
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: pathlib.Path, kind: str) -> list[dict]:
    notebook = json.loads(path.read_text())
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_four_tutorials():
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]


@EACH
def test_a_notebook_is_stored_as_one_clean_run(path):
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) > 3
    for output in outputs:
        assert output["output_type"] in ("stream", "display_data", "execute_result"), output
        assert output.get("name") != "stderr", output
        text = "".join(output.get("text", output.get("data", {}).get("text/plain", "")))
        assert not MACHINE.search(text), text
    assert not any(MACHINE.search("".join(cell["source"])) for cell in code)
    assert path.stat().st_size < 150_000
    metadata = json.loads(path.read_text())["metadata"]
    assert set(metadata) == {"kernelspec", "language_info"}
    assert not any(cell["metadata"] for cell in code)


def stored(path: pathlib.Path, of: str) -> str:
    """The stored text of the cell whose source contains a text."""
    (cell,) = [cell for cell in cells(path, "code") if of in "".join(cell["source"])]
    return "".join("".join(output.get("text", [])) for output in cell["outputs"])


def test_the_stored_results_have_the_wording_of_the_code():
    """Lines of objects and tests; the numbers of the tests may differ."""
    def words(text: str) -> list[str]:
        return re.sub(r"[-−+]?\d[\d.,]*", "#", text).splitlines()

    model, axis = jp.load("mini"), jp.load_axis("mini")
    assert stored(NOTEBOOKS[0], "print(axis)").splitlines() == [repr(model), repr(axis)]
    vector = dataclasses.replace(2 * axis, name="toward a role")
    assert stored(NOTEBOOKS[1], "print(-vector").endswith(
        f"{-vector!r}\n{2 * vector!r}\n{vector!r}\n")
    tested = jp.check(model, axis, layers=slice(4, 8))
    assert words(stored(NOTEBOOKS[2], "jp.check(")) == words("\n".join([repr(tested),
                                                                       *tested.sentences]))


@EACH
def test_a_notebook_says_that_mini_is_no_evidence(path):
    text = " ".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert re.search(r"model organism", text) and re.search(r"not\s+evidence", text)


@EACH
def test_the_code_of_a_notebook_uses_public_names(path):
    """Names of `jaxpersona` are those of its face, and names of its modules have no underscore."""
    tree = ast.parse("\n\n".join("".join(cell["source"]) for cell in cells(path, "code")))
    used = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (
                node.value.id == "jp"):
            assert node.attr in jp.__all__, node.attr
            used += 1
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("jp.capture",
                                                                             "jp.where"):
            assert hasattr(getattr(jp, ast.unparse(node.value)[3:]), node.attr), node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxpersona"):
            assert "._" not in f".{node.module}"
            for alias in node.names:
                assert not alias.name.startswith("_")
                whole = f"{node.module}.{alias.name}"
                assert hasattr(importlib.import_module(node.module or ""), alias.name) or (
                    importlib.util.find_spec(whole)), whole
    assert used > 3


def run(notebook: pathlib.Path) -> list[dict]:
    """Execute a notebook in a process of its own, as `make notebooks` does; return its cells."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason="notebooks need the extra `docs`: make test-notebooks")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "notebooks.py"), str(notebook)],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{notebook.name}: " in done.stdout
    return cells(notebook, "code")


@pytest.mark.slow
@EACH
def test_a_notebook_runs(path, tmp_path):
    """Only success is compared."""
    code = run(pathlib.Path(shutil.copy(path, tmp_path)))
    assert all(cell["execution_count"] for cell in code)


@pytest.mark.slow
def test_the_third_tutorial_runs_on_another_model(checkpoint, tmp_path):
    """The branch for a model of your own, whose roles and questions are those of the package."""
    notebook = json.loads(NOTEBOOKS[2].read_text())
    (first, *_) = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    first["source"] = f"MODEL = {str(checkpoint)!r}\nROLES, QUESTIONS, PROMPTS = 3, 2, 4\n"
    copy = tmp_path / NOTEBOOKS[2].name
    copy.write_text(json.dumps(notebook))
    code = run(copy)
    said = "".join("".join(output.get("text", "")) for cell in code for output in cell["outputs"])
    assert "3 roles: " in said and "perplexity of ordinary replies, cap: " in said
