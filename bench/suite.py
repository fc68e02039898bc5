"""Run the CPU benchmarks, save their results and write the report.

    python bench/suite.py [--only cap_overhead rows …] [--tag cpu]

Each benchmark runs in its own process, which by default takes two or three minutes. The last line
of its output is saved as `bench/results/<bench>-<tag>.json`. If a benchmark fails, the error is
reported, the other benchmarks still run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
BENCHES = {
    "cap_overhead": ["--sweep"], "rows": [], "decode": [], "extract": [], "pipeline": [],
    "peers": [], "roofline": [],
}


def main() -> None:
    """Run the benchmarks, then write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(BENCHES), choices=list(BENCHES))
    parser.add_argument("--tag", default="cpu")
    parser.add_argument("--limit", type=float, default=300.0,
                        help="time limit per benchmark in seconds")
    args = parser.parse_args()
    failed = []
    for name in args.only:
        begun = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *BENCHES[name]],
                                  check=True, stdout=subprocess.PIPE, text=True,
                                  timeout=args.limit)
            found = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            print(f"   failed: {error}")
            failed.append(name)
            continue
        path = HERE / "results" / f"{name}-{args.tag}.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"   {time.perf_counter() - begun:.0f} s, {path}", flush=True)
    subprocess.run([sys.executable, str(HERE / "report.py")], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
