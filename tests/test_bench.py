"""Benchmark statistics, and the number of kernels that a cap adds to a compiled step."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from scipy import stats

from jaxpersona.interventions import cap

BENCH = pathlib.Path(__file__).parents[1] / "bench"


@pytest.fixture(autouse=True)
def bench_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield
    for name in ("common", "decoding", "conversations", "mixed", "peers", "report", "roofline",
                 "suite", "exported", "same_bits"):
        sys.modules.pop(name, None)


def test_pairs_stop_when_the_interval_is_narrow_and_say_when_it_is_not():
    import common

    calm = common.paired({"a": lambda: 1.0, "b": lambda: 1.25}, "a", pairs=50)
    assert calm["b"]["ratio"] == 0.8 and calm["b"]["pairs"] == 10 and not calm["b"]["unresolved"]
    noise = itertools.cycle([1.0, 2.0, 4.0])
    wild = common.paired({"a": lambda: 2.0, "b": lambda: next(noise)}, "a", pairs=19)
    assert wild["b"]["unresolved"] and wild["b"]["pairs"] == 19
    few = common.paired({"a": lambda: 2.0, "b": lambda: next(noise)}, "a", pairs=3)
    assert few["b"]["pairs"] == 10  # the minimum number of pairs
    late = common.paired({"a": lambda: 2.0, "b": lambda: next(noise)}, "a", pairs=99, budget=0.0)
    assert late["b"]["unresolved"] and late["b"]["pairs"] == 10
    many = itertools.cycle([9.95, 10.05])  # above 1, the width is relative to the ratio
    large = common.paired({"a": lambda: next(many), "b": lambda: 1.0}, "a", pairs=19)
    assert not large["b"]["unresolved"]


def median_quantile(values, q):
    """Return the exact q-quantile of the bootstrap median for odd n.

    The median is at most the k-th smallest value if more than half of n draws are at most that
    value, each with probability k/n.
    """
    n = len(values)
    for k, value in enumerate(sorted(values), 1):
        if stats.binom.sf(n // 2, n, k / n) >= q:
            return value


@pytest.mark.parametrize("n", [41, 51])
def test_an_interval_is_the_bootstrap_s_of_the_median(n):
    """Use a skewed sample, whose mean and 90 % interval differ from the tested values."""
    import common

    values = 1.3 ** np.arange(n)
    low, high = common.interval(np.random.default_rng(0).permutation(values))
    assert (low, high) == (pytest.approx(median_quantile(values, 0.025)),
                           pytest.approx(median_quantile(values, 0.975)))
    assert low < median_quantile(values, 0.05) and high > median_quantile(values, 0.95)
    assert common.interval([2.5] * 10) == (2.5, 2.5)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0])
def test_an_interval_is_unresolved_above_two_hundredths_of_the_ratio_and_of_one(ratio):
    import common

    for width, wanted in ((0.0196, False), (0.0204, True)):
        half = width / 2 * max(1.0, ratio)
        turn = itertools.cycle([1 / (ratio - half), 1 / (ratio + half)])
        # long calls: one call per pair
        found = common.paired({"a": lambda: 20.0, "b": lambda t=turn: 20.0 * next(t)}, "a",
                              pairs=15)
        low, high = found["b"]["interval"]
        assert high - low == pytest.approx(2 * half, abs=2e-4), "the exact interval must be known"
        assert found["b"]["unresolved"] == wanted, (ratio, width)


def test_each_arm_of_a_pair_runs_for_two_seconds_evenly_interleaved():
    import common

    called: list[str] = []

    def arm(name: str, *seconds: float):
        clock = itertools.cycle(seconds)
        return lambda: called.append(name) or next(clock)

    # after a warm-up call, the faster of two calls determines the calls per pair
    found = common.paired({"slow": arm("slow", 1.0), "fast": arm("fast", 0.3, 0.25, 0.35, 0.26)},
                          "slow")
    assert len(called) == 6 + 10 * (2 + 8)
    pairs = [called[i : i + 10] for i in range(6, len(called), 10)]
    for pair in pairs:
        assert pair.count("slow") == 2 and pair.count("fast") == 8
        assert max(len(list(run)) for _, run in itertools.groupby(pair)) <= 4
    assert found["fast"]["seconds"] == pytest.approx(0.28)  # median of the calls in a pair
    assert found["fast"]["ratio"] == pytest.approx(1 / 0.28, abs=1e-3)


def test_every_other_pair_runs_backwards_and_a_long_call_is_warmed_up_twice():
    import common

    called: list[str] = []
    arms = {name: lambda name=name: called.append(name) or 3.0 for name in "abc"}
    common.paired(arms, "a")
    assert "".join(called) == "aabbcc" + 5 * "abccba"


def test_a_small_budget_shortens_the_pairs():
    import common

    calls = itertools.count()
    common.paired({"a": lambda: next(calls) and 0.1, "b": lambda: 0.1}, "a", budget=4.0)
    assert next(calls) == 3 + 10 * 2  # 4 s / 10 pairs / 2 arms


def test_a_card_s_memory_is_that_of_both_programs(monkeypatch):
    """PyTorch may be unused, in use, or only partly imported."""
    import common

    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 5})
    monkeypatch.setattr(common.jax, "local_devices", lambda: [device, device])

    def torch(**cuda):
        return types.SimpleNamespace(cuda=types.SimpleNamespace(**cuda))

    for there, wanted in (
        (types.SimpleNamespace(), 10), (torch(), 10),
        (torch(is_initialized=lambda: False), 10),
        (torch(is_initialized=lambda: True, memory_allocated=lambda: 7), 17),
    ):
        monkeypatch.setitem(sys.modules, "torch", there)
        with common.Peak() as peak:
            device.memory_stats = lambda: {"bytes_in_use": 8}
        assert peak.start == wanted and peak.above == 6
        device.memory_stats = lambda: {"bytes_in_use": 5}
    monkeypatch.delitem(sys.modules, "torch")
    with common.Peak() as peak:
        pass
    assert peak.start == 10


def test_the_last_line_is_one_json_object(capsys):
    import common

    common.report("rows", "mini", argparse.Namespace(batch=3), distinct_over_shared=1.0)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"bench", "model", "device", "versions", "arguments"} <= set(found)
    assert found["arguments"] == {"batch": 3} and "jax" in found["versions"]


def test_a_cap_adds_two_kernels_a_layer_and_three_a_step():
    from decoding import NOTHING, Decoding

    model = s.tiny_model(n_layers=3, d_model=64)
    setting = Decoding(model, 8, 4)
    direction = np.random.default_rng(0).normal(size=64)
    bare, half, every = (setting.fusions(edits) for edits in (
        NOTHING, cap(direction, layers=[1, 2], floor=1.0),
        cap(direction, layers=[0, 1, 2], floor=1.0)))
    assert 0 < every - half <= 2
    assert every - bare <= 2 * 3 + 3


def test_conversations_are_of_mixed_length_and_the_same_at_every_call():
    from conversations import conversations

    one, two = conversations(50, 97, 30, 64), conversations(50, 97, 30, 64)
    lengths = [row.tokens.size for row in one]
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(one, two, strict=True))
    assert min(lengths) >= 8 and max(lengths) == 64 and len(set(lengths)) > 10


STUB = """#!/bin/sh
echo "$@" > "$TRACE"
"""


@pytest.mark.parametrize("named", [None, "folder", "bench/results"])
def test_a_rehearsal_does_not_write_over_the_results_of_a_gpu(tmp_path, named):
    """SMALL=1 writes to a temporary folder or to the given folder, but never to bench/results."""
    stub, trace = tmp_path / "python", tmp_path / "trace"
    stub.write_text(STUB)
    stub.chmod(0o755)
    before = sorted((BENCH / "results").iterdir())
    folder = None if named is None else str(tmp_path / named) if named == "folder" else named
    out = subprocess.run(
        ["bash", str(BENCH / "gpu.sh"), "1", *([folder] if folder else [])], text=True,
        capture_output=True, env={**os.environ, "SMALL": "1", "PYTHON": str(stub), "OUT": "",
                                  "TRACE": str(trace), "TMPDIR": str(tmp_path), "HLO": ""})
    assert sorted((BENCH / "results").iterdir()) == before
    if named == "bench/results":
        assert out.returncode == 2 and "a folder other than bench/results" in out.stdout
        assert not trace.exists()
        return
    assert out.returncode == 0, out.stderr
    words = trace.read_text().split()
    chosen = words[words.index("--out") + 1]
    assert chosen == folder if folder else chosen.startswith(str(tmp_path))
    assert "--small" in words and "--hlo" not in words


def test_the_gpu_script_needs_no_installed_package(tmp_path):
    """The script gives Python the package and its version, which is read from metadata."""
    stub = tmp_path / "python"
    stub.write_text(f"""#!/bin/sh
exec {sys.executable} -S -c 'import os, sys, importlib.metadata as m, importlib.util as u
sys.path[:0] = os.environ["PYTHONPATH"].split(":")
print(m.version("jaxpersona"), u.find_spec("jaxpersona").origin)'
""")
    stub.chmod(0o755)
    out = subprocess.run(
        ["bash", str(BENCH / "gpu.sh"), "1"], text=True, capture_output=True, check=True,
        env={**os.environ, "SMALL": "1", "PYTHON": str(stub), "PYTHONPATH": "", "OUT": "",
             "TMPDIR": str(tmp_path)})
    version, origin = out.stdout.split()[-2:]
    assert version == importlib.metadata.version("jaxpersona")
    assert origin.startswith(str(tmp_path)) and origin.endswith("jaxpersona/__init__.py")


def test_an_arm_that_is_not_judged_does_not_prolong_the_pairs():
    import common

    noise = itertools.cycle([1.0, 2.0, 4.0])
    arms = {"a": lambda: 2.0, "b": lambda: 2.5, "c": lambda: next(noise)}
    found = common.paired(arms, "a", pairs=19, judged=["b"])
    assert found["c"]["unresolved"] and found["c"]["pairs"] == 10


def test_an_exported_program_has_its_arrays_as_arguments_and_the_rest_as_constants(tmp_path):
    import exported

    def call(x, scale, shift):
        return x["h"].astype(shift.dtype) * x["n"] * scale + shift

    arguments = ({"h": jnp.arange(4, dtype=jnp.bfloat16), "n": 3}, 0.5,
                 np.arange(4.0, dtype=np.float32))
    for name in "ab":
        exported._save(tmp_path / name, call, arguments)
    shared = {}
    once, found = exported.timer(tmp_path / "a", shared)
    assert found.tolist() == [0.0, 2.5, 5.0, 7.5] and once() > 0
    count = len(shared)
    assert count == 2 and np.array_equal(exported.timer(tmp_path / "b", shared)[1], found)
    assert len(shared) == count, "equal arguments must be one array on the device"


def test_arrays_are_the_same_only_if_every_bit_is():
    import same_bits

    a = np.array([0.0, np.nan, 1.0], np.float32)
    assert same_bits.same(a, a.copy())
    for other in (a * -1, a.astype(np.float64), a[:2], a[None], np.nextafter(a, 2)):
        assert not same_bits.same(a, other)
    assert same_bits.difference(np.array([1.0, 4.0]), np.array([1.0, 5.0])) == 0.2
    assert same_bits.difference(a, a[:2]) == "(3,) (2,)"


def test_a_matmul_counts_a_multiplication_and_an_addition_per_term(monkeypatch):
    import common

    monkeypatch.setattr(common, "seconds_of", lambda call: 0.5)
    assert common.peak_flops(jnp.float32, 8) == 2 * 8**3 / 0.5


def test_the_roofline_counts_the_cache_halfway_through_the_steps(monkeypatch):
    import roofline

    model, told = s.tiny_model(), {}
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--batch", "2", "--steps", "8", "--prompt",
                                      "6", "--width", "32", "--rows", "1"])
    monkeypatch.setattr(roofline.jp, "load", lambda *_, **__: model)
    monkeypatch.setattr(roofline, "bandwidth", lambda: 1e9)
    monkeypatch.setattr(roofline, "peak_flops", lambda dtype: 1e9)
    monkeypatch.setattr(roofline, "seconds_of", lambda call: 1.0)
    monkeypatch.setattr(roofline.Decoding, "timer", lambda self: lambda: 8.0)  # one second per step
    monkeypatch.setattr(roofline, "report", lambda *_, **more: told.update(more))
    roofline.main()
    config = model.config
    weights = config.parameters - config.vocab_size * config.d_model
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * (6 + 4)
    assert told["points"][0]["flops_per_second"] == 2 * (2 * weights + attention)
    assert told["points"][1]["flops_per_second"] == config.prefill_flops(32)


def test_a_failed_benchmark_fails_the_suite_and_the_others_are_kept(tmp_path, monkeypatch):
    """The report is written in any case; `cap_overhead` gets the options of the suite."""
    import suite

    ran = []

    def run(command, **_):
        ran.append([pathlib.Path(command[1]).stem, *command[2:]])
        if ran[-1][0] == "rows":
            raise subprocess.CalledProcessError(1, command)
        last = "no JSON" if ran[-1][0] == "decode" else '{"bench": "cap_overhead"}'
        return types.SimpleNamespace(stdout=f"a table\n{last}\n")

    (tmp_path / "results").mkdir()
    monkeypatch.setattr(suite, "HERE", tmp_path)
    monkeypatch.setattr(suite.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["suite.py", "--only", "rows", "decode", "cap_overhead"])
    with pytest.raises(SystemExit) as ended:
        suite.main()
    assert ended.value.code == "failed: rows, decode"  # a text is exit status 1
    assert ran == [["rows"], ["decode"], ["cap_overhead", "--sweep"], ["report"]]
    (file,) = (tmp_path / "results").iterdir()
    assert file.name == "cap_overhead-cpu.json"
    assert json.loads(file.read_text()) == {"bench": "cap_overhead"}
    monkeypatch.setattr(sys, "argv", ["suite.py", "--only", "cap_overhead"])
    suite.main()


def test_ratios_to_a_peer_are_its_seconds_divided_by_ours():
    from mixed import role_prompts, summary

    arm = {"ratio": 2.0, "interval": [1.9, 2.1], "unresolved": False, "pairs": 10}
    found = summary({"hooks": {**arm, "seconds": 8.0}, "sorted": {**arm, "seconds": 6.0},
                     "ours": {**arm, "seconds": 4.0}})
    assert found["ratio"] == 2.0 and found["ratio_to_sorted"] == 1.5
    assert found["seconds"] == {"hooks": 8.0, "sorted": 6.0, "ours": 4.0}
    talks = role_prompts(7, "Ada")
    assert len({talk[-1]["content"] for talk in talks}) == len(talks) == 7


def test_the_fastest_arm_of_a_side_is_that_of_its_best_run_after_the_first():
    from peers import fastest

    def arm(*seconds):
        return iter(seconds).__next__

    arms = {"ours a": arm(0.1, 5.0, 5.0, 5.0), "ours b": arm(9.0, 6.0, 4.0, 6.0),
            "hooks a": arm()}
    assert fastest(arms, "ours") == "ours b"
    assert fastest(arms, "hooks") == "hooks a"  # a single arm is not run


def test_a_report_names_the_arguments_of_a_run_and_marks_unresolved_ratios():
    report = importlib.import_module("report")

    value = {"bench": "rows", "model": "mini", "device": "cpu", "date": "today",
             "arguments": {"batch": 8, "temperature": 0.0, "top_p": 0.9, "distinct": [],
                           "dtype": None},
             "distinct_over_shared": 0.98, "interval": [0.9, 1.1], "unresolved": True}
    assert report.describe(value) == "mini, batch 8, top_p 0.9, cpu, today"
    assert report.figures(value) == [("distinct ÷ shared", "0.98 [0.9, 1.1] *unresolved*")]
    assert report.figures({**value, "unresolved": False})[0][1] == "0.98 [0.9, 1.1]"
