"""Which module may import which, what `import jaxpersona` loads, and how long a file may be."""

from __future__ import annotations

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# every module may import those of a lower level and of its own group
LEVELS = (
    ("config", "inputs", "interrupt", "compile_cache", "chips", "processes", "runtime", "missing"),
    ("family_keys", "families"), ("presets",),
    ("sharding", "hlo"), ("params", "programs"), ("kernels",), ("nn",), ("batch",),
    ("interventions", "cache"), ("readings",), ("capture",), ("vectors",), ("trace",), ("model",),
    ("fences",), ("sampling", "decode"),
    ("ckpts",), ("sandbox", "sandbox_worker"), ("template",), ("chat",), ("load",), ("prompts",),
    ("schedule", "nonfinite"),
    ("generate", "extract"), ("spec_forms", "specs", "learn", "plan"), ("persona",),
    ("organism", "data"), ("report",), ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
NARROW = {  # less than what their level would allow
    "ckpts": {"config", "inputs", "families", "params", "sharding", "vectors", "ckpts"},
    "template": {"batch", "sandbox", "template"},
    "sandbox": {"sandbox"},
    "sandbox_worker": set(),  # a script that starts with Jinja alone
    "chat": {"batch", "fences", "sandbox", "template", "chat"},
    "kernels": {"kernels"},
}


def group(path: pathlib.Path) -> str:
    """The module of the package, or its sub-package, that a file belongs to."""
    parts = path.relative_to(ROOT).parts
    name = parts[0] if parts[0] in ("kernels", "ckpts") else parts[1].removesuffix(".py")
    return "cli" if name.startswith("cli") else name


def files() -> list[pathlib.Path]:
    """Every Python file of the package."""
    folders = [ROOT / name for name in ("jaxpersona", "kernels", "ckpts")]
    found = [p for folder in folders for p in folder.rglob("*.py")]
    return sorted(p for p in found if p != ROOT / "jaxpersona" / "__init__.py")


def imported(path: pathlib.Path) -> set[str]:
    """The groups of ours that a file imports, those for type checkers alone left out."""
    tree = ast.parse(path.read_text())
    skip = {id(n) for node in ast.walk(tree) if isinstance(node, ast.If)
            and "TYPE_CHECKING" in ast.dump(node.test) for n in ast.walk(node)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports inside are absolute"
            if node.module == "jaxpersona":
                names |= {f"jaxpersona.{alias.name}" for alias in node.names}
            else:
                names.add(str(node.module))
    ours = {name.split(".")[1] for name in names if name.startswith("jaxpersona.")}
    return {"cli" if name.startswith("cli") else name for name in ours}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    me = group(path)
    assert me in LEVEL, f"give {me!r} a level"
    for other in sorted(imported(path)):
        assert other in LEVEL, f"{other!r} is not a module of the package"
        if me in NARROW:
            assert other in NARROW[me], f"{me} imports {other}"
        assert other == me or LEVEL[other] <= LEVEL[me], f"{me} imports {other}, which is above it"


def test_no_file_has_two_subjects():
    ours = [p for p in ROOT.rglob("*.py")
            if not set(p.relative_to(ROOT).parts) & {".venv", "build", ".git"}]
    long = {str(p.relative_to(ROOT)): n for p in ours
            if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"more than 400 lines: {long}"


def test_mapped_packages_hold_a_docstring_and_nothing_else():
    for name in ("kernels", "ckpts"):
        body = ast.parse((ROOT / name / "__init__.py").read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr)


def python(code: str, folder: pathlib.Path = ROOT) -> str:
    """Run code in a fresh interpreter; return what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_package_loads_little_and_fast():
    heavy = ("torch", "transformers", "optax", "orbax", "matplotlib", "sklearn", "typer", "rich",
             "pydantic", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "scipy.stats")
    code = ("import resource, sys\ndef spent(): return resource.getrusage(0).ru_utime\n"
            f"def loaded(): return [m for m in {heavy!r} if m in sys.modules]\n"
            "import jax, numpy, flax.struct\n"
            "given = loaded()\n"  # flax brings rich
            "import jaxpersona\nprint(spent(), *[m for m in loaded() if m not in given])")
    out = [python(code).split() for _ in range(2)]
    assert not out[0][1:], f"import jaxpersona loads {out[0][1:]}"
    # processor seconds, the lesser of two runs: other programs' load is not the import's
    assert min(float(line[0]) for line in out) < 2.0


def test_transformers_does_not_take_our_kernels_for_its_own():
    assert python("from transformers import Qwen3ForCausalLM; print('ok')").strip() == "ok"
