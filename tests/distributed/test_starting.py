"""How processes begin and take turns, and the sharding rules, without other processes."""

from __future__ import annotations

import contextlib

import jax
import numpy as np
import pytest
import support as s
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from jaxpersona.distributed import processes, sharding
from jaxpersona.errors import UserError


def mesh(**axes):
    return AbstractMesh(tuple(axes.values()), tuple(axes),
                        axis_types=(AxisType.Explicit,) * len(axes))


@pytest.fixture
def asked(monkeypatch):
    """Record the settings and the arguments with which `jax.distributed` is initialized."""
    found = []

    @contextlib.contextmanager
    def changed(name, value, *, default):
        found.append((name, value, default))
        yield

    monkeypatch.setattr(processes, "joined", lambda: False)
    monkeypatch.setattr(processes, "default_setting", changed)
    monkeypatch.setattr(processes.jax.distributed, "initialize",
                        lambda *given, **named: found.append((given, named)))
    return found


def test_processes_begin_with_the_given_numbers_and_without_asynchronous_dispatch(asked):
    """A process counts as dead after 30 seconds without a heartbeat."""
    processes.start("here:1234", 3, 2)
    processes.start()
    setting = ("jax_cpu_enable_async_dispatch", False, True)
    assert asked == [setting, (("here:1234", 3, 2), {"heartbeat_timeout_seconds": 30}),
                     setting, ((None, None, None), {"heartbeat_timeout_seconds": 30})]


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_what_jax_says_about_a_failed_beginning_is_one_line(asked, monkeypatch, kind):
    """JAX's message is put on one line and cut at 200 characters."""
    def refuse(*_, **__):
        raise kind("no\n coordinator " + "x" * 300)

    monkeypatch.setattr(processes.jax.distributed, "initialize", refuse)
    with pytest.raises(UserError, match=r"cannot be initialized \(no coordinator x{50}") as caught:
        processes.start("here:1", 1, 0)
    assert "\n" not in str(caught.value) and "x" * 186 not in str(caught.value)


@pytest.mark.parametrize(("first", "order"), [(True, ["act", "wait", "wait"]),
                                              (False, ["wait", "act", "wait"])])
def test_the_first_process_acts_before_the_others(monkeypatch, first, order):
    """Every process waits twice, so that the calls match."""
    seen = []
    monkeypatch.setattr(processes, "many", lambda: True)
    monkeypatch.setattr(processes, "first", lambda: first)
    monkeypatch.setattr(processes, "merge", lambda items: seen.append("wait"))
    assert processes.in_turn(lambda: seen.append("act") or 7) == 7 and seen == order


@pytest.mark.parametrize(("first", "order"), [
    (True, ["act", "barrier", "barrier"]), (False, ["barrier", "act", "barrier"])])
def test_an_error_of_one_process_leaves_no_other_waiting(monkeypatch, first, order):
    """A process whose `act` raises still reaches both barriers, and its error is raised."""
    seen = []

    def act():
        seen.append("act")
        raise OSError("no space")

    monkeypatch.setattr(processes, "many", lambda: True)
    monkeypatch.setattr(processes, "first", lambda: first)
    monkeypatch.setattr(processes, "merge", lambda items: seen.append("barrier") or items)
    with pytest.raises(OSError, match="no space"):
        processes.in_turn(act)
    assert seen == order


@pytest.mark.parametrize(("given", "there", "words"), [
    (("h:1", 2, 1), (2, 1), ""), (("h:1", 2, 0), (2, 1), "process index is 0, but .* index 1;"),
    (("h:1", 3, 1), (2, 1), "process count is 3 .* with process count 2 and"),
    ((None, None, None), (2, 1), ""),
], ids=str)
def test_processes_that_have_begun_are_compared(monkeypatch, given, there, words):
    """Both numbers must agree if they are given."""
    monkeypatch.setattr(processes, "joined", lambda: True)
    monkeypatch.setattr(processes.jax, "process_count", lambda: there[0])
    monkeypatch.setattr(processes.jax, "process_index", lambda: there[1])
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        processes.start(*given)


def test_a_process_leaves_with_its_code(monkeypatch):
    """The exit code is that of the argument."""
    left = []
    monkeypatch.setattr(processes.os, "_exit", left.append)
    processes.leave(3)
    assert left == [3]


@pytest.mark.parametrize(("axes", "shape", "wanted"), [
    (("batch", None), {"data": 2, "model": 2}, PartitionSpec("data", None)),
    (("batch", None), {"data": 2, "fsdp": 2, "model": 2}, PartitionSpec(("data", "fsdp"), None)),
    (("heads", "embed"), {"data": 2, "model": 2}, PartitionSpec("model", None)),
    (("heads", "embed"), {"fsdp": 2, "model": 2, "group": 2},
     PartitionSpec(("model", "group"), "fsdp")),
    (("kv_heads", "kv_group"), {"model": 2, "group": 2}, PartitionSpec("model", "group")),
    (("kv_heads", "kv_group"), {"model": 2}, PartitionSpec("model", None)),
    (("vocab", "ff"), {"data": 2}, PartitionSpec(None, None)),
], ids=str)
def test_logical_axes_are_sharded_over_the_axes_of_the_mesh(axes, shape, wanted):
    """Axes that the mesh does not have are omitted."""
    assert sharding.spec(axes, mesh(**shape)) == wanted


@pytest.mark.parametrize(("shape", "axis", "ways"), [
    ({"data": 2, "fsdp": 3, "model": 4}, "batch", 6), ({"data": 2, "model": 4}, "batch", 2),
    ({"data": 2, "model": 4, "group": 2}, "heads", 8), ({"model": 4, "group": 2}, "kv_heads", 4),
    ({"data": 2, "fsdp": 3}, "embed", 3), ({"data": 2}, "vocab", 1)], ids=str)
def test_the_shards_of_an_axis_are_counted(shape, axis, ways):
    """The sizes of all mesh axes of a logical axis are multiplied."""
    assert sharding.ways(mesh(**shape), axis) == ways


@pytest.mark.parametrize(("shape", "fields", "wanted"), [
    ({"data": 2, "model": 2}, {}, {"data": 2, "model": 2}),
    ({"data": 2, "model": 4}, {}, {"data": 2, "model": 2, "group": 2}),
    ({"data": 1, "fsdp": 2, "model": 4}, {}, {"data": 1, "fsdp": 2, "model": 2, "group": 2}),
    ({"model": 4}, {"n_kv_heads": 1}, {"model": 1, "group": 4}),
    ({"model": 1}, {}, {"model": 1}), ({"data": 8}, {}, {"data": 8}),
], ids=str)
def test_a_mesh_is_divided_into_groups_where_key_heads_are_few(shape, fields, wanted):
    """The new axis follows the axis "model", and other meshes stay as they are."""
    made = sharding.fit(mesh(**shape), s.tiny_config(**fields))
    assert dict(made.shape) == wanted and list(made.shape) == list(wanted)
    assert made.axis_types == (AxisType.Explicit,) * len(wanted)


@pytest.mark.parametrize(("text", "wanted"), [
    ("data=2", {"data": 2}), (" fsdp=2 ,model=4", {"fsdp": 2, "model": 4}),
    ("model=999999999", {"model": 999_999_999}), ("model=1234567890", None), ("model=-1", None),
    ("model", None), ("", None), ("group=2", None), ("data=2;model=4", None), ("data=2,", None),
    ("model=4,model=4", None), ("data =2", None)])
def test_a_mesh_in_words(text, wanted):
    """Each axis has one size of up to nine digits; spaces around a part are ignored."""
    if wanted is None:
        with pytest.raises(UserError, match="^mesh is .*; give sizes of data, model and fsdp"):
            sharding.parse_mesh(text)
    else:
        assert sharding.parse_mesh(text) == wanted


def test_values_are_gathered_by_row_and_stay_in_range():
    """An index beyond the end reads the last value."""
    x = np.arange(24).reshape(2, 4, 3)
    assert sharding.of_each(x, np.array([1, 3])).tolist() == [x[0, 1].tolist(), x[1, 3].tolist()]
    found = sharding.of_each(x, np.array([[0, 9], [2, 1]]))
    assert found.shape == (2, 2, 3) and found[0, 1].tolist() == x[0, 3].tolist()
    assert found[1].tolist() == x[1, [2, 1]].tolist()


def test_an_array_on_a_mesh_is_copied_to_the_host_and_others_are_not():
    """Arrays on one device and other values are returned unchanged."""
    spread = jax.device_put(np.arange(8.0), jax.NamedSharding(
        sharding.make_mesh(data=8), PartitionSpec("data")))
    here, plain = jax.numpy.ones(2), np.ones(2)
    found = sharding.off_mesh({"a": spread, "b": here, "c": plain, "d": 5})
    assert isinstance(found["a"], np.ndarray) and found["a"].tolist() == list(range(8))
    assert found["b"] is here and found["c"] is plain and found["d"] == 5
    assert sharding.rows_divisor(spread) == 8 and sharding.rows_divisor(here) == 1
    assert sharding.mesh_of(plain, here, spread) == spread.sharding.mesh
