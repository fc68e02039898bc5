"""The wheel contains everything that an installed package needs."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).parents[1]


def test_the_wheel_is_whole(tmp_path):
    source = tmp_path / "source"  # a copy, because setuptools builds in the source tree
    skip = shutil.ignore_patterns(".git", ".venv", "build", "*.egg-info", "__pycache__", ".*_cache",
                                  "tests", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=lambda folder, names: {
        *skip(folder, names), *(("runs",) if folder == str(ROOT) else ())})
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q",
         "-w", str(tmp_path)], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"jaxpersona/{p.relative_to(ROOT / 'jaxpersona').as_posix()}"
              for p in (ROOT / "jaxpersona").rglob("*.py")}
    for folder in ("kernels", "ckpts"):
        wanted |= {f"jaxpersona/{p.relative_to(ROOT).as_posix()}"
                   for p in (ROOT / folder).rglob("*.py")}
    data = ROOT / "jaxpersona" / "data"
    wanted |= {f"jaxpersona/data/{p.relative_to(data).as_posix()}" for p in data.rglob("*")
               if p.suffix in (".json", ".jsonl", ".md", ".png")}
    wanted.add("jaxpersona/py.typed")
    wanted |= {f"jaxpersona/report/run_page.{kind}" for kind in ("html", "css", "js")}
    wanted |= {f"jaxpersona/ckpts/mini/{name}" for name in (
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
        "axis.safetensors")}
    assert not (missing := sorted(wanted - names)), f"missing from the wheel: {missing}"
    assert not [name for name in names if name.startswith(("kernels/", "ckpts/", "tests/"))]
    # unpacked outside the source tree, the package imports and finds its model
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (f"import sys; sys.path.insert(0, {str(site)!r}); import jaxpersona as jp; "
            f"assert jp.__file__.startswith({str(site)!r}); import jaxpersona.kernels.reference; "
            "print(jp.load('mini').config.n_layers, jp.__version__)")
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                         text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    layers, version = ran.stdout.split()
    assert int(layers) > 0 and f"jaxpersona-{version}-" in wheel.name
