"""Compare the compiled programs of this checkout with those of another one, in one process.

    git worktree add /tmp/before main && python bench/exported.py /tmp/before --batch 1 8 32

Two processes of the same checkout can differ by several percent, because their memory layouts
differ (`bench/compare.py` shows this noise). Here, a process of each checkout exports its programs
(`jax.export`) together with their arguments, and the main process compiles all of them and times
them in alternating pairs. The times contain no Python code of either checkout. A ratio above 1
means that this checkout is faster; `same_tokens` states whether both programs return the same
tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).resolve().parents[1]
BAR = 0.98
ARMS = ("decode", "capped", "prefill")


def export_all(root: pathlib.Path, out: pathlib.Path, args: argparse.Namespace) -> None:
    """Export the programs of the imported checkout, which must be the one in the folder `root`."""
    sys.path.insert(0, str(root / "bench"))
    import decoding

    import jaxpersona as jp

    if root not in pathlib.Path(jp.__file__).resolve().parents:
        raise SystemExit(f"jaxpersona was imported from {jp.__file__}, which is not in {root}")
    model = jp.load(args.model)
    depth = model.config.n_layers
    direction = np.random.default_rng(0).normal(size=model.config.d_model).astype(np.float32)
    cap = jp.cap(direction, layers=slice(depth // 2, depth), floor=0.0)
    for rows in args.batch:
        setting = decoding.Decoding(model, rows, args.steps)
        for arm in args.arms:
            edits = cap if arm == "capped" else decoding.NOTHING
            read = jp.capture.mean() if arm == "prefill" else decoding.Capture()

            def prefill(params: Any, batch: Any, how: Any, setting: Any = setting,
                        edits: Any = edits, read: Any = read) -> Any:
                setting.params, setting.batch, setting.how = params, batch, how
                return setting.start(edits, read).tokens

            def decode(*arguments: Any, greedy: bool = setting.greedy) -> Any:
                return decoding.decode(*arguments, greedy=greedy).tokens

            stem = out / f"{arm}-{rows}"
            if arm == "prefill":
                _save(stem, prefill, (setting.params, setting.batch, setting.how))
            else:
                _save(stem, decode, setting.arguments(setting.start(edits, read), edits, read))


def _save(stem: pathlib.Path, call: Callable[..., Any], given: tuple) -> None:
    """Write the exported program and its array arguments; other arguments become constants."""
    leaves, tree = jax.tree.flatten(given)
    arrays = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array | np.ndarray)]

    def flat(*values: jax.Array) -> Any:
        whole = list(leaves)
        for i, value in zip(arrays, values, strict=True):
            whole[i] = value
        return call(*jax.tree.unflatten(tree, whole))

    values = [np.asarray(leaves[i]) for i in arrays]
    exported = jax.export.export(jax.jit(flat))(*values)
    stem.with_suffix(".program").write_bytes(bytes(exported.serialize()))
    np.savez(stem.with_suffix(".npz"), *values)


def timer(stem: pathlib.Path,
          shared: dict[Any, jax.Array]) -> tuple[Callable[[], float], np.ndarray]:
    """Return a function that runs an exported program and returns the seconds, and its tokens.

    Args:
      stem: the path of the files that `_save` wrote, without the suffix.
      shared: the arrays that are already on the device, by content. Equal arguments of both
        programs are one array, so that the position of the weights in memory favors neither.
    """
    exported = jax.export.deserialize(bytearray(stem.with_suffix(".program").read_bytes()))
    program = jax.jit(exported.call)
    values = []
    with np.load(stem.with_suffix(".npz")) as stored:
        for name, kind in zip(stored.files, exported.in_avals, strict=True):
            value = stored[name].view(kind.dtype)  # bfloat16 is read as raw bytes
            key = kind.dtype, kind.shape, hashlib.sha256(value.tobytes()).digest()
            if key not in shared:
                shared[key] = jnp.asarray(value)
            values.append(shared[key])
    tokens = np.asarray(program(*values))

    def once() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(program(*values))
        return time.perf_counter() - begun

    return once, tokens


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Export the programs of both checkouts, time them and return the ratios."""
    from common import paired
    from compare import run_in

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        places = {"this": HERE, "other": pathlib.Path(args.other).resolve()}
        for name, root in places.items():
            out = pathlib.Path(folder) / name
            out.mkdir()
            run_in(root, __file__, "--one", str(out), "--model", args.model,
                   "--steps", str(args.steps), "--batch", *map(str, args.batch),
                   "--arms", *args.arms)
        for rows in args.batch:
            for arm in args.arms:
                shared: dict[Any, jax.Array] = {}
                sides = {name: timer(pathlib.Path(folder) / name / f"{arm}-{rows}", shared)
                         for name in places}
                timed = paired({name: once for name, (once, _) in sides.items()}, "other",
                               pairs=args.pairs, budget=args.budget)["this"]
                timed |= {"holds": timed["interval"][0] >= BAR - 0.01 and not timed["unresolved"],
                          "same_tokens": bool(np.array_equal(sides["this"][1], sides["other"][1]))}
                found[f"{arm} {rows}"] = timed
                print(f"{arm} {rows}: {timed}", flush=True)
    return found


def main() -> None:
    """Run the comparison and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", help="folder of the checkout to compare with")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--pairs", type=int, default=200,
                        help="maximum number of pairs (at least 10)")
    parser.add_argument("--budget", type=float, default=120.0,
                        help="time limit per comparison in seconds")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        export_all(pathlib.Path(args.other).resolve(), pathlib.Path(args.one), args)
        return
    from common import report

    report("exported", args.model, args, arms=compare(args))


if __name__ == "__main__":
    main()
