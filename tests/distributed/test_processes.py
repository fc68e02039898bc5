"""Two processes with four devices each: the same axis, shared work, failures, and resumption."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import load_axis

from jaxpersona.distributed import processes

MESH = "fsdp=2,model=4"
WORKER = """
import sys
from jaxpersona.cli.main import main
from jaxpersona.ckpts import tensorfile
whole, read = tensorfile.read_slice, [0]
def counted(entry, index=()):
    values = whole(entry, index)
    read[0] += values.nbytes
    return values
tensorfile.read_slice = counted
try:
    main(sys.argv[1:])
finally:
    print("bytes read:", read[0], flush=True)
"""


def ask(out):
    return ["axis", "--out", str(out), "--judge", "none", "--limit", "3", "--limit-questions", "1",
            "--min-count", "1", "--max-new-tokens", "6", "--batch-size", "8",
            "--temperature", "0", "--json"]


def start(out, port, index):
    """Start one of two worker processes."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu",
           "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    place = ["--mesh", MESH, "--coordinator", f"127.0.0.1:{port}", "--processes", "2",
             "--process", str(index)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *ask(out), *place], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def pair(out):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(out, port, index) for index in (0, 1)]


def finish(workers):
    said = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    return said


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".png" and path.name != "status.json"}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Run two processes; return their folder and their output."""
    out = tmp_path_factory.mktemp("two") / "run"
    return out, finish(pair(out))


def test_two_processes_find_the_axis_of_one(together, tmp_path, capsys):
    out, said = together
    assert s.run_command(ask(tmp_path / "one")) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    shared = json.loads(said[0][0].splitlines()[-2])
    assert shared["rollouts"] == alone["rollouts"]
    assert "rollouts" not in said[1][0]  # only the first process prints
    one, two = (load_axis(folder / "axis.safetensors") for folder in (tmp_path / "one", out))
    assert s.relative(two.values, one.values) <= 1e-5
    assert two.fingerprint == one.fingerprint
    assert set(contents(out)) == set(contents(tmp_path / "one"))
    read = [int(stdout.split("bytes read:")[1]) for stdout, _ in said]
    weights = sum(np.prod(shape) * 4 for shape in shapes())
    assert all(value < 0.51 * weights for value in read), (read, weights)


def shapes():
    from jaxpersona.ckpts import hf
    from jaxpersona.ckpts.loading import _mini

    entries, _ = hf.read_entries(_mini())
    return [entry.shape for entry in entries.values()]


@pytest.mark.slow
def test_a_death_ends_the_run_clearly_and_a_resume_ends_in_the_same_bytes(together, tmp_path):
    out = tmp_path / "run"
    workers = pair(out)
    while not list(out.glob("rollouts/*.jsonl")):
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.05)
    workers[1].send_signal(signal.SIGKILL)
    _, error = workers[0].communicate(timeout=120)
    workers[1].communicate()
    assert workers[0].returncode not in (0, None)
    lines = [line for line in error.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "another process of this run ended" in lines[0], error
    assert not (out / "axis.safetensors").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("rollouts/*.jsonl")}
    finish(pair(out))
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert contents(out) == contents(together[0])


@pytest.mark.parametrize(("arguments", "wanted"), [
    (["--processes", "2"], "give all three"),
    (["--coordinator", "here:1", "--processes", "2", "--process", "2"], "it must be in 0…1"),
    (["--coordinator", "here", "--processes", "2", "--process", "0"], "give host:port"),
    (["--mesh", "data=99"], "needs 99 devices; available: 8"),
    (["--mesh", "model=2,data=x"], "give sizes of data"),
    (["--mesh", "data=8", "--batch-size", "12"], "multiple of 8"),
])
def test_mistakes_are_one_line(tmp_path, capsys, arguments, wanted):
    assert s.run_command([*ask(tmp_path / "run"), *arguments]) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1 and wanted in lines[0]


@pytest.mark.parametrize(("given", "wanted"), [
    (("here:1", 2, None), "give all three"), ((None, 2, 0), "give all three"),
    (("here:1", "2", 0), "the process count is '2'; it must be an integer"),
    (("here:1", 2, 1.0), "process index is 1.0; it must be an integer"),
    (("here:1", 2, -1), "process index is -1; it must be in 0…1"),
    (("here:1", 2, 2), "is 2; it must be"),
    (("here:123456", 2, 0), "give host:port"), ((":1", 2, 0), "give host:port"),
])
def test_wrong_arguments_are_refused_before_anything_starts(given, wanted, monkeypatch):
    monkeypatch.setattr(processes, "joined", lambda: pytest.fail("the arguments are accepted"))
    with pytest.raises(ValueError, match=wanted):
        processes.start(*given)


def test_a_total_wraps_and_keeps_the_type(monkeypatch):
    from jax.experimental import multihost_utils

    values = np.array([[250, 3], [0, 255]], np.uint8)
    for gather, wanted in ((lambda x: np.stack([x, x, x]), [[238, 9], [0, 253]]),
                           (lambda x: x, [[250, 3], [0, 255]])):
        monkeypatch.setattr(multihost_utils, "process_allgather", gather)
        found = processes.total(values)
        assert found.dtype == np.uint8 and found.tolist() == wanted


def test_messages_of_any_length_are_merged(monkeypatch):
    """The processes' messages are padded to the longest."""
    import pickle

    from jax.experimental import multihost_utils

    other = np.frombuffer(pickle.dumps({"b": "x" * 500}), np.uint8)

    def gather(x):
        if x.dtype != np.uint8:
            return np.array([x, [other.size]])
        assert x.size == other.size
        return np.stack([x, other])

    monkeypatch.setattr(processes, "many", lambda: True)
    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    assert processes.merge({"a": 1}) == {"a": 1, "b": "x" * 500}


@pytest.mark.parametrize("count", [2, 3])
def test_each_piece_of_work_has_one_owner_and_the_shares_are_even(count, monkeypatch):
    monkeypatch.setattr(processes, "many", lambda: True)
    monkeypatch.setattr(processes.jax, "process_count", lambda: count)
    for pieces in range(1, 8):
        shares = []
        for index in range(count):
            monkeypatch.setattr(processes.jax, "process_index", lambda index=index: index)
            shares.append([i for i in range(pieces) if processes.owns(i)])
        assert sorted(sum(shares, [])) == list(range(pieces))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_others():
    import jax.numpy as jnp

    assert processes.first() and processes.owns(7) and not processes.many()
    assert processes.merge({"a": 1}) == {"a": 1} and processes.in_turn(lambda: 5) == 5
    tree = processes.fetch({"x": jnp.ones(3, jnp.float32), "y": np.zeros(2)})
    assert isinstance(tree["x"], np.ndarray)


OWN = """
import sys
import jax
from jaxpersona.distributed import processes
jax.config.update("jax_cpu_enable_async_dispatch", False)
assert not processes.joined()  # which initialises no back end: the next line needs that
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
assert processes.joined() and processes.many()
me = processes.index()
assert me == int(sys.argv[2]) and processes.first() == (me == 0)
assert [processes.owns(i) for i in range(4)] == [i % 2 == me for i in range(4)]
assert processes.merge({str(me): me}) == {"0": 0, "1": 1}
order = processes.merge({str(me): processes.in_turn(__import__("time").monotonic)})
assert order["0"] < order["1"]
processes.start(f"127.0.0.1:{sys.argv[1]}", 2, me)  # agrees with what is there
processes.start()
try:
    processes.start(f"127.0.0.1:{sys.argv[1]}", 3, me)
except ValueError as error:
    assert "already initialized with process count 2" in str(error)
else:
    raise AssertionError
print("done", flush=True)
"""


def test_processes_that_the_user_has_joined_are_seen():
    """The processes are recognized, although `processes.start` was not called."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    workers = [subprocess.Popen([sys.executable, "-c", OWN, str(port), str(index)], env=env,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for index in (0, 1)]
    said = finish(workers)
    assert all(out.split()[-1] == "done" for out, _ in said)


def test_the_count_is_that_of_jax(monkeypatch):
    """The number of processes comes from JAX, even without `jax.distributed`."""
    import jax

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert processes.many() and not processes.first() and processes.index() == 1
    assert [processes.owns(i) for i in range(4)] == [False, True, False, True]
    with pytest.warns(UserWarning, match="jax_cpu_enable_async_dispatch', False"):
        processes.warn_of_deadlock()
    monkeypatch.setattr(processes, "setting", lambda name: False)
    processes.warn_of_deadlock()  # warnings are errors
