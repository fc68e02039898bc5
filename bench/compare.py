"""Compare the speed of this checkout with that of another checkout, in alternating pairs.

    git worktree add /tmp/before main && python bench/compare.py /tmp/before --model mini

Each process uses the package and the `decoding.py` of one checkout. The arms (timed calls) are
decode and capped decode at every batch size, prefill, extraction and, with `--folder`, loading of a
checkpoint. A ratio above 1 means that this checkout is faster. The times of two processes of the
same checkout can differ by a few percent, because their memory layouts differ. Every arm is
therefore measured in several rounds (`--restarts`), each with new processes: one of this checkout
and two of the other. The field `same` is the interval of the ratio between the two processes of the
other checkout, which shows the measurement noise. `bench/exported.py` compares only the compiled
programs of both checkouts, in one process and with less noise.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve().parents[1]
BAR = 0.98


class Side:
    """A process that times the arms of one checkout."""

    def __init__(self, root: pathlib.Path, links: pathlib.Path, args: argparse.Namespace) -> None:
        environment = {**os.environ, "PYTHONPATH": str(links)}
        command = [sys.executable, "-P", __file__, str(root), "--one", "--model", args.model,
                   "--steps", str(args.steps), "--batch", *map(str, args.batch),
                   *(["--folder", args.folder] if args.folder else [])]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)
        self.kernels: dict[str, int] = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a benchmark process failed; its error is printed above")
        return json.loads(line)

    def seconds(self, arm: str) -> float:
        """Call an arm once and return the seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(arm + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def linked(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a folder for PYTHONPATH from which `import jaxpersona` imports the given checkout."""
    with tempfile.TemporaryDirectory() as folder:
        package = pathlib.Path(folder) / "jaxpersona"
        package.mkdir()
        for path in [*(root / "jaxpersona").iterdir(), root / "kernels", root / "ckpts"]:
            (package / path.name).symlink_to(path)
        yield pathlib.Path(folder)


def run_in(root: pathlib.Path, script: str, *arguments: str) -> None:
    """Run a script with a checkout's package; the script's first argument is the checkout.

    Raises:
      CalledProcessError: the script failed.
    """
    with linked(root) as links:
        subprocess.run([sys.executable, "-P", script, str(root), *arguments], check=True,
                       env={**os.environ, "PYTHONPATH": str(links)})


def serve(root: pathlib.Path, args: argparse.Namespace) -> None:
    """Print the fusion counts, then run each arm named on standard input and print its seconds."""
    sys.path.insert(0, str(root / "bench"))
    import time

    import jax
    import numpy as np
    from decoding import NOTHING, Decoding

    import jaxpersona as jp

    if root not in pathlib.Path(jp.__file__).resolve().parents:
        raise SystemExit(f"jaxpersona was imported from {jp.__file__}, which is not in {root}")
    model = jp.load(args.model)
    depth, rng = model.config.n_layers, np.random.default_rng(0)
    cap = jp.cap(rng.normal(size=model.config.d_model).astype(np.float32),
                 layers=slice(depth // 2, depth), floor=0.0)
    arms, kernels = {}, {}
    settings = {rows: Decoding(model, rows, args.steps) for rows in args.batch}
    for rows, setting in settings.items():
        for name, edit in (("decode", NOTHING), ("capped", cap)):
            arms[f"{name} {rows}"] = setting.timer(edit)
            kernels[f"{name} {rows}"] = setting.fusions(edit)

    last = settings[args.batch[-1]]

    mean = jp.capture.mean()

    def prefill() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(last.start(NOTHING, mean).token)
        return time.perf_counter() - begun

    talks = [rng.integers(0, model.config.vocab_size, n).tolist()
             for n in rng.integers(16, 128, 4 * max(args.batch))]

    def extract() -> float:
        begun = time.perf_counter()
        jp.extract(model, talks, capture=jp.capture.mean(jp.everywhere))
        return time.perf_counter() - begun

    def load() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(jp.load(args.folder, dtype="bfloat16").params)
        return time.perf_counter() - begun

    arms |= {"prefill": prefill, "extract": extract}
    if args.folder:
        arms["load"] = load
    for arm in arms.values():
        arm()
    print(json.dumps(kernels), flush=True)
    for line in sys.stdin:
        print(json.dumps(arms[line.strip()]()), flush=True)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Time every arm in both checkouts; print and return the ratios and their intervals."""
    from common import LONG, WIDTH, interval, turn_about

    other = pathlib.Path(args.other).resolve()
    arms = [f"{name} {rows}" for rows in args.batch for name in ("decode", "capped")]
    arms += ["prefill", "extract", *(["load"] if args.folder else [])]
    if args.arms is not None:
        arms = [arm for arm in arms if arm.split()[0] in args.arms]
    ratios: dict[str, list[float]] = {arm: [] for arm in arms}
    same: dict[str, list[float]] = {arm: [] for arm in arms}
    kernels: dict[str, Any] = {}
    with linked(HERE) as here, linked(other) as there:
        for restart in range(args.restarts):
            places = [(HERE, here), (other, there), (other, there)]
            order = [(i + restart) % 3 for i in range(3)]
            sides = dict(sorted((i, Side(*places[i], args)) for i in order))
            kernels = {arm: [sides[1].kernels[arm], sides[0].kernels[arm]]
                       for arm in sides[0].kernels}
            for arm in arms:
                calls = {str(i): functools.partial(side.seconds, arm)
                         for i, side in sides.items()}
                turns = {i: max(1, math.ceil(LONG / call())) for i, call in calls.items()}
                for turn in range(args.pairs):
                    names = map(str, order if turn % 2 else order[::-1])
                    spent = turn_about({name: calls[name] for name in names}, turns)
                    ratios[arm].append(spent["1"] / spent["0"])
                    same[arm].append(spent["1"] / spent["2"])
            for side in sides.values():
                side.close()
            print(f"round {restart + 1} of {args.restarts} complete", file=sys.stderr,
                  flush=True)
    found = {}
    for arm in arms:
        low, high = interval(ratios[arm])
        found[arm] = {"ratio": round(statistics.median(ratios[arm]), 4),
                      "interval": [round(low, 4), round(high, 4)],
                      "same": [round(x, 4) for x in interval(same[arm])],
                      "holds": low >= BAR - 0.01, "unresolved": high - low > WIDTH,
                      "kernels": kernels.get(arm)}
        print(arm, json.dumps(found[arm]), flush=True)
    return found


def main() -> None:
    """Run the comparison and print the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", help="folder of the checkout to compare with")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=8,
                        help="decode steps per call; fewer steps make calls alternate more often")
    parser.add_argument("--pairs", type=int, default=8, help="number of pairs per arm and round")
    parser.add_argument("--arms", nargs="+",
                        choices=("decode", "capped", "prefill", "extract", "load"),
                        help="arms to time; default: all")
    parser.add_argument("--folder", help="a bfloat16 checkpoint, for the arm `load`")
    parser.add_argument("--restarts", type=int, default=3,
                        help="number of rounds, each with new processes")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        serve(pathlib.Path(args.other).resolve(), args)
        return
    from common import report

    report("compare", args.model, args, arms=compare(args))


if __name__ == "__main__":
    main()
