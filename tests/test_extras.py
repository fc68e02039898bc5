"""A package that is missing is named with the `pip` line that installs it, wherever it is used."""

from __future__ import annotations

import ast
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import types

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import gguf_header, hub, orbax, tokenizer, torchfile

from jaxpersona import extras
from jaxpersona.errors import UserError
from jaxpersona.judges.endpoint import Endpoint
from jaxpersona.persona import axis as science
from jaxpersona.planning import chips
from jaxpersona.report import figures, run_page
from jaxpersona.training import learn

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = dict(extras.REQUIREMENTS)


def _torch(folder):
    import zipfile

    with zipfile.ZipFile(folder / "v.pt", "w") as archive:
        archive.writestr("v/data.pkl", b"")
    torchfile.read_pickle(folder / "v.pt")


def _orbax(folder):
    model = s.tiny_model()
    orbax.save(folder / "model", model.params, model.config)


def _training(folder):
    learn.fit(s.tiny_model(), learn.Direction(32, [1]), lambda out, batch: 0.0, [object()],
              steps=1, folder=folder)


def _tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")
    tokenizer.read_tokenizer(folder)


USES = {
    "torch": _torch, "gguf": lambda folder: gguf_header.import_gguf(folder / "v.gguf"),
    "matplotlib": lambda folder: figures.by_layer(folder / "x.png", {"a": [1.0]}, "t"),
    "sklearn": lambda _: science.principal_components(np.eye(3), np.ones(3)),
    "orbax": _orbax, "transformers": _tokenizer,
    "huggingface_hub": lambda _: hub.download("owner/name", None),
    "openai": lambda _: Endpoint("m", url="http://localhost:1/v1"),
    "plotly": lambda _: run_page.plotly_js(),
}


@pytest.mark.parametrize("package", USES)
def test_a_missing_package_is_one_line_with_its_remedy(package, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name == package or name.startswith(package + "."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=re.escape(extras.pip_line(package))) as caught:
        USES[package](tmp_path)
    assert "\n" not in str(caught.value) and isinstance(caught.value, extras.MissingPackage)


@pytest.mark.parametrize("text", ["from os import nothing_of_this_name",
                                  "import nothing_of_this_name.part"])
def test_a_package_that_is_installed_but_broken_is_told_apart(text, tmp_path, monkeypatch):
    (tmp_path / "gguf.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(UserError, match=r"gguf cannot be imported: .*nothing_of_this_name.*pip"):
        extras.require("gguf", "GGUF files need gguf")


def test_another_way_follows_the_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError) as caught:
        extras.require("gguf", "GGUF files need gguf", "or convert the file")
    assert str(caught.value) == ("GGUF files need gguf: pip install 'jaxpersona[gguf]', "
                                 "or convert the file")


def test_a_missing_libtpu_is_no_error_of_a_plan(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    assert not extras.installed("libtpu") and chips.tpu_devices("v5e:2x2") is None


def test_every_import_of_such_a_package_is_preceded_by_require():
    """In the same file; imports for type checkers alone are left out."""
    faults = []
    for folder in ("jaxpersona", "ckpts", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(path.read_text())
            typed = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If)
                     and "TYPE_CHECKING" in ast.dump(node.test) for n in ast.walk(node)}
            required = {str(n.args[0].value).split(".")[0] for n in ast.walk(tree)
                        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "require"
                        and isinstance(n.args[0], ast.Constant)}
            if re.search(r"^from jaxpersona\.report(\.style)? import .*", path.read_text(), re.M):
                required.add("matplotlib")  # `style` requires it
            for node in ast.walk(tree):
                if id(node) in typed or not isinstance(node, (ast.Import, ast.ImportFrom)):
                    continue
                names = ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                         else [str(node.module)])
                faults += [f"{path.relative_to(ROOT)}:{node.lineno}: {name}" for name in names
                           if (top := name.split(".")[0]) in PACKAGES and top not in required]
    assert not faults, faults


def test_the_lines_name_what_pip_knows():
    """Extras of pyproject.toml, and dependencies."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {re.split(r"[<>=\[]", line)[0] for line in project["dependencies"]}
    known |= {f"'jaxpersona[{extra}]'" for extra in project["optional-dependencies"]}
    assert set(PACKAGES.values()) <= known


def test_figures_that_cannot_be_drawn_do_not_end_a_run(tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace

    from jaxpersona.cli import support

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = SimpleNamespace(projections={"default": np.ones((2, 3)), "ghost": np.zeros((2, 3))})
    support.draw_run(tmp_path, run, 1, [])
    assert capsys.readouterr().err == ("not all figures could be drawn: figures need matplotlib: "
                                       "pip install 'jaxpersona[figures]'\n")


def test_transformers_does_not_advise_to_install_pytorch():
    """In a program, not only in the command; and the variable is not left behind."""
    code = ("import sys, os; sys.modules['torch'] = None; import jaxpersona.extras as e; "
            "e.require('transformers', ''); assert e._NO_ADVICE not in os.environ")
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_tpu_compiler_is_there_if_make_has_installed_it():
    """`make test` names its extras; without libtpu, the tests that need it would be skipped."""
    if "tpu" in os.environ.get("JAXPERSONA_TEST_EXTRAS", "").split(","):
        assert importlib.util.find_spec("libtpu"), (
            "make test has the extra tpu, but libtpu is not installed; delete "
            ".venv/.installed-test and run make test again, or run make test EXTRAS=test")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["test", "test-all"])
def test_make_names_the_extras_of_the_platform(target):
    command = ["make", "--dry-run", "--always-make", target]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "EXTRAS"}
    said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    linux = (platform.system(), platform.machine()) == ("Linux", "x86_64")
    extras_of = "test,tpu" if linux else "test"
    assert f"JAXPERSONA_TEST_EXTRAS={extras_of} " in said.stdout
    assert f"'.[{extras_of}]'" in said.stdout


def test_a_module_without_a_spec_is_not_installed(monkeypatch):
    """Such as a stand-in that a test or a notebook put into sys.modules."""
    monkeypatch.setitem(sys.modules, "gguf", types.ModuleType("gguf"))
    assert sys.modules["gguf"].__spec__ is None and not extras.installed("gguf")
    assert extras.installed("numpy") and not extras.installed("no_such_package")


def test_a_user_s_choice_of_advice_stays(monkeypatch):
    """The variable is set only during the import, and only if the user has not set it."""
    monkeypatch.setenv(extras._NO_ADVICE, "0")
    with extras._without_advice():
        assert os.environ[extras._NO_ADVICE] == "0"
    assert os.environ[extras._NO_ADVICE] == "0"
    monkeypatch.delenv(extras._NO_ADVICE)
    with extras._without_advice():
        assert os.environ[extras._NO_ADVICE] == "1"
    assert extras._NO_ADVICE not in os.environ


@pytest.mark.parametrize(("package", "line"), [
    ("torch", "'jaxpersona[torch]'"), ("gguf", "'jaxpersona[gguf]'"), ("plotly",
                                                                       "'jaxpersona[report]'"),
    ("libtpu", "'jaxpersona[tpu]'"), ("matplotlib", "'jaxpersona[figures]'"),
    ("openai", "'jaxpersona[http]'"), ("pandas", "'jaxpersona[frames]'"), ("scipy", "scipy"),
    ("orbax", "orbax-checkpoint"), ("transformers", "transformers")])
def test_a_package_has_the_line_of_its_extra(package, line):
    """The extra that contains the package, or the package's own name on the index."""
    assert extras.pip_line(package) == f"pip install {line}"
