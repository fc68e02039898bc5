"""Import order of modules, modules loaded by `import jaxpersona`, and maximum file length."""

from __future__ import annotations

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# each entry may import itself and earlier entries; a file with its own entry is not part of its
# package's entry
ORDER = (
    "errors", "extras", "brief", "calls", "inputs", "export", "interrupt", "runtime",
    "models.config",
    "distributed", "progress", "kernels", "models", "interventions", "captures",
    "interventions.fusion", "interventions.trace", "models.forward", "vectors", "text", "engine",
    "planning", "ckpts", "interventions.specs", "training", "data", "judges", "runs", "persona",
    "organism", "report", "cli",
)
NARROW = {  # stricter limits than the order
    "text.sandbox": {"brief"},
    "text.sandbox_worker": set(),  # a script that imports only Jinja
    "text.template": {"models", "text"},
    "text.fences": set(),
    "text.special_tokens": set(),
    "text.chat": {"brief", "calls", "models", "text"},
    "kernels": {"kernels"},
    "models.config": {"brief"},
    "ckpts": {"brief", "calls", "ckpts", "distributed", "engine", "extras", "inputs", "models",
              "models.config", "progress", "runtime", "vectors"},
}
PLACE = {name: place for place, name in enumerate(ORDER)}


def module(path: pathlib.Path) -> str:
    """Return the name of a file's module, without the package name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "jaxpersona" else parts
    return ".".join(part for part in parts if part != "__init__")


def files() -> dict[str, pathlib.Path]:
    """Return every module of the package by name, except the package itself."""
    folders = [ROOT / name for name in ("jaxpersona", "kernels", "ckpts")]
    found = sorted(p for folder in folders for p in folder.rglob("*.py"))
    return {module(p): p for p in found if p != ROOT / "jaxpersona" / "__init__.py"}


FILES = files()


def group(name: str) -> str:
    """Return the entry of `ORDER` that a module belongs to."""
    return name if name in PLACE else name.split(".")[0]


def imported(path: pathlib.Path) -> set[str]:
    """Return the package's modules that a file imports, except those only for type checking."""
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
            assert not node.level, f"{path}: imports within the package must be absolute"
            for alias in node.names:  # a module, or a name in a module
                whole = f"{node.module}.{alias.name}"
                known = whole.removeprefix("jaxpersona.") in FILES
                names.add(whole if known else str(node.module))
    return {name.removeprefix("jaxpersona.") for name in names if name.startswith("jaxpersona.")}


@pytest.mark.parametrize("name", FILES)
def test_imports_run_one_way(name):
    """Check packages, and files that have their own entry."""
    me = group(name)
    assert me in PLACE, f"add {me!r} to ORDER"
    for other in sorted(imported(FILES[name])):
        assert other in FILES, f"{other!r} is not a module of the package"
        theirs = group(other)
        narrow = NARROW.get(name, NARROW.get(me))
        if narrow is not None:
            assert theirs in narrow | {"errors"}, f"{name} imports {other}"
        assert PLACE[theirs] <= PLACE[me], f"{name} imports {other}, which comes after it"


def test_no_files_import_each_other():
    """Check imports inside a package and inside functions, too."""
    graph = {name: imported(path) - {name} for name, path in FILES.items()}
    done: set[str] = set()

    def follow(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a cycle: {' → '.join((*way[way.index(name):], name))}"
        if name not in done:
            for other in sorted(graph[name]):
                follow(other, (*way, name))
            done.add(name)

    for name in graph:
        follow(name, ())


def test_the_order_names_what_there_is():
    used = {group(name) for name in FILES}
    assert used == set(ORDER)
    assert set(NARROW) <= set(FILES) | set(ORDER)


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


# seconds() is the time since the start, without the time that the thread waited for a CPU which
# other programs used (Linux counts it)
SECONDS = """
import pathlib, sys, time
start = time.perf_counter()
def waited():
    counts = pathlib.Path("/proc/self/schedstat")
    return int(counts.read_text().split()[1]) / 1e9 if counts.exists() else 0.0
before = waited()
def seconds(): return time.perf_counter() - start - (waited() - before)
"""


def python(code: str, folder: pathlib.Path = ROOT) -> str:
    """Run code in a new interpreter; return its output."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True,
                          text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_package_loads_little_and_fast():
    heavy = ("torch", "transformers", "optax", "orbax", "matplotlib", "sklearn", "typer", "rich",
             "pydantic", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "scipy.stats")
    code = (f"{SECONDS}\n"
            f"def loaded(): return [m for m in {heavy!r} if m in sys.modules]\n"
            "import jax, numpy, flax.struct\n"
            "given = loaded()\n"  # flax imports rich
            "import jaxpersona\nprint(seconds(), *[m for m in loaded() if m not in given])")
    taken = []
    while len(taken) < 4 and not any(one < 2.0 for one in taken):
        one, *more = python(code).split()
        assert not more, f"import jaxpersona loads {more}"
        taken.append(float(one))
    assert min(taken) < 2.0


def test_the_help_of_the_command_is_fast():
    code = (f"{SECONDS}\nsys.argv = ['jaxpersona', '--help']\n"
            "from jaxpersona.cli.main import main\n"
            "try: main()\nexcept SystemExit as end: assert not end.code\nprint(seconds())")
    taken = []
    while len(taken) < 4 and not any(one < 1.5 for one in taken):
        said = python(code)
        assert "Usage: jaxpersona" in said and "generate" in said
        taken.append(float(said.split()[-1]))
    assert min(taken) < 1.5


def test_transformers_does_not_take_our_kernels_for_its_own():
    assert python("from transformers import Qwen3ForCausalLM; print('ok')").strip() == "ok"
