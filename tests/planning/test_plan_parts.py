"""Parts of a plan: shapes, topologies, temporaries and the cost of a cap, against manual counts."""

from __future__ import annotations

import pytest
from test_plan import SMALL

from jaxpersona.models.config import replace
from jaxpersona.models.presets import preset
from jaxpersona.planning import chips, hlo, plan


@pytest.mark.parametrize(("context", "width"), [(2, 1), (7, 6), (8, 6), (256, 192), (2048, 1536),
                                                (2052, 1540), (8192, 7680)])
def test_a_quarter_of_the_slots_up_to_512_is_for_the_reply(context, width):
    shapes = plan.Shapes.of(4, context)
    assert (shapes.batch, shapes.width, shapes.slots) == (4, width, context)
    assert shapes.new == context - width


def test_a_sixty_fourth_of_the_memory_is_the_runtime_s():
    assert plan.usable(chips.CHIPS["v5e"]) == 15.75 * 2**30


@pytest.mark.parametrize(("topology", "name", "count"), [
    ("v5p:2x2x2", "v5p", 8), ("H200:8", "h200", 8), ("v6e:1x3", "v6e", 3)])
def test_a_topology_is_a_chip_and_a_count(topology, name, count):
    assert chips.parse(topology) == (chips.CHIPS[name], count)


def test_a_plan_of_int8_weights_reads_a_byte_per_number():
    found = plan.plan(preset("llama-3.1-8b"), "h200:1", batch=1, dtype="int8")
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336
    scales = 4 * (4096 + 2 * 1024 + 2 * 14_336 + 2 * 4096)
    table, norms = 128_256 * (4096 + 4), 2 * 4096 * (2 * 32 + 1)
    read = 32 * (layer + scales) + table + norms
    assert found["bytes_per_chip"]["weights"] == read + table
    assert found["roofline_seconds"]["decode_step"] == pytest.approx(
        (read + 1792 * 131_072) / 4800e9)


@pytest.mark.parametrize(("sizes", "width", "scores"), [
    ({"data": 1, "model": 1}, 96, 8 * 8 * 96 * 128),
    ({"data": 2, "model": 4}, 96, 4 * 2 * 96 * 128),
    ({"data": 1, "model": 8}, 96, 8 * 1 * 96 * 128),  # four key/value heads, each held twice
    ({"data": 2, "model": 1}, 1024, 4 * 8 * 512 * 1056),  # of one chunk of 512 queries
    ({"data": 1, "model": 1}, 4096, 0),  # splash attention keeps no scores
])
def test_a_tpu_s_temporaries_are_the_formula(sizes, width, scores):
    """Float32 scores twice, gate and up projections, and three arrays of the residual stream."""
    mesh = plan._mesh(sizes, None, SMALL)
    found = plan.activation_bytes(SMALL, mesh, plan.Shapes(8, width, width + 32),
                                  chips.CHIPS["v5e"])
    tokens = 8 // sizes["data"] * width
    assert found == tokens * (8 * 256 + 8 * 512 // sizes["model"]) + 8 * scores


class Program:
    """A compiled program of one fusion in a loop."""

    def as_text(self):
        return ("%body (p: f32[4]) -> f32[4] {\n  ROOT %f = f32[4]{0} fusion(%p)\n}\n"
                "ENTRY %main (a: f32[4]) -> f32[4] {\n  ROOT %w = f32[4] while(%a), body=%body\n}")

    def cost_analysis(self):
        return {"bytes accessed": 77.0}


def test_a_prefill_s_temporaries_are_extrapolated_from_two_depths(monkeypatch):
    """Of 40 layers, 8 and 12 are compiled; three capped layers of 12 stand for eight of 40."""
    jobs = []

    def lowered(params, config, shapes, layers):
        assert params == (config.n_layers, "int8")
        return ("prefill", config.n_layers, layers), ("decode", config.n_layers, layers)

    def compiled(job):
        jobs.append(job)
        kind, depth, layers = job
        return (Program() if kind == "decode" and not layers else None,
                1000 + 50 * depth + 7 * len(layers) if kind == "prefill" else 30 + len(layers))

    monkeypatch.setattr(plan, "abstract_weights", lambda config, _, dtype: (config.n_layers, dtype))
    monkeypatch.setattr(plan, "lowered", lowered)
    monkeypatch.setattr(plan, "_compile", compiled)
    eight = tuple(range(20, 28))
    found = plan.compile_for(replace(SMALL, n_layers=40), None, plan.Shapes(8, 96, 128), eight,
                             "int8")
    assert sorted(jobs) == [("decode", 40, ()), ("decode", 40, eight), ("prefill", 8, ()),
                            ("prefill", 12, ()), ("prefill", 12, (6, 7, 8))]
    plain, capped = found["plain"], found["capped"]
    assert (plain.prefill_temporaries, plain.decode_temporaries) == (1000 + 50 * 40, 30)
    assert (capped.prefill_temporaries, capped.decode_temporaries) == (1000 + 50 * 40 + 21, 38)
    assert plain.temporaries == 3000 and plain.bytes == 77
    assert hlo.fusions(plain.operations) == 1
    assert capped.operations == () and capped.bytes == 0  # exceeds the memory


@pytest.mark.parametrize(("said", "size"), [("(1.5G)", 1.5 * 2**30), ("(3.25M)", 3.25 * 2**20)])
def test_the_size_of_what_does_not_fit_is_that_of_the_error(said, size):
    import jax

    class Lowered:
        def __init__(self, status):
            self.status = status

        def compile(self):
            raise jax.errors.JaxRuntimeError(f"{self.status}: hbm requirement {said} exceeded")

    assert plan._compile(Lowered("RESOURCE_EXHAUSTED")) == (None, size)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        plan._compile(Lowered("INTERNAL"))


def test_a_cap_s_cost_is_what_its_program_adds():
    def ops(kind, *counts):  # by layer; the last count is of operations outside the layers
        scopes = [f"jit(f)/layer{i}/dot" for i in range(len(counts) - 1)] + ["jit(f)/dot"]
        return tuple(hlo.Operation(kind, scope, 4, kind == "fusion")
                     for scope, n in zip(scopes, counts, strict=True) for _ in range(n))

    plain = plan.Compiled(100, 80, ops("all-reduce", 1, 2, 0, 3) + ops("fusion", 5, 5, 5, 2), 400)
    capped = plan.Compiled(110, 120, ops("all-reduce", 1, 3, 0, 3) + ops("fusion", 6, 8, 7, 6),
                           1000)
    found = plan.compare({"plain": plain, "capped": capped}, (0, 1, 2))
    assert found == {
        "collectives_per_layer": 2, "added_collectives": 1, "added_fusions_per_layer": 2,
        "added_fusions_once": 4, "added_bytes": 600, "temporaries_ratio": 1.2,
        "temporaries_by_program": {"prefill": 1.1, "decode": 1.5}}
    none = dict.fromkeys(found)
    assert plan.compare({"plain": plain}, ()) == none | {"collectives_per_layer": 2}
    unknown = plan.Compiled(1, 1, (), 0)
    assert plan.compare({"plain": plain, "capped": unknown}, (0,)) == (
        none | {"collectives_per_layer": 2})
    assert plan.compare({"plain": unknown, "capped": capped}, (0,)) == none == (
        plan.compare(None, (0,)))


@pytest.mark.parametrize(("name", "memory", "bandwidth", "peak", "link"), [
    ("v5e", 16 * 2**30, 819e9, 197e12, 200e9), ("v5p", 95 * 2**30, 2765e9, 459e12, 600e9),
    ("v6e", 32 * 2**30, 1640e9, 918e12, 448e9), ("a100", 80e9, 2039e9, 312e12, 300e9),
    ("h100", 80e9, 3350e9, 989e12, 450e9), ("h200", 141e9, 4800e9, 989e12, 450e9)])
def test_a_chip_has_its_published_numbers(name, memory, bandwidth, peak, link):
    """TPU memory is in GiB, GPU memory in GB; links count in one direction."""
    chip = chips.CHIPS[name]
    assert (chip.name, chip.memory, chip.bandwidth, chip.peak, chip.link) == (
        name, memory, bandwidth, peak, link)
    assert (name in chip.source) == (name in chips.TPUS)


@pytest.mark.parametrize(("count", "wanted"), [
    (1, (1, 1)), (8, (1, 8)), (16, (1, 16)), (32, (2, 16)), (6, (3, 2)), (7, (7, 1)), (12, (3, 4))])
def test_the_model_axis_is_the_largest_that_fits(count, wanted):
    """Up to 16; 64 query heads cannot be divided by 3."""
    sizes = plan.choose_mesh(preset("llama-3.3-70b"), count)
    assert (sizes["data"], sizes["model"]) == wanted


def test_a_plan_has_its_arguments_and_its_hours():
    """The hours of a run are those at each share of the roofline, to one digit."""
    found = plan.plan(SMALL, "h100:2", name="mine", batch=4, context=512,
                      cap_layers=[1, 2], mesh={"data": 2, "model": 1})
    assert (found["model"], found["topology"], found["chips"], found["dtype"]) == (
        "mine", "h100:2", 2, "bfloat16")
    assert (found["batch"], found["context"], found["prompt"]) == (4, 512, 384)
    assert found["cap"] == [1, 2]
    assert found["mesh"] == {"data": 2, "model": 1} and found["short_by"] == 0
    assert found["chip"]["name"] == "h100" and found["chip"]["memory"] == 80e9
    size = found["bytes_per_chip"]
    assert size["total"] == size["weights"] + size["cache"] + size["temporaries"]
    assert size["usable"] == 78_750_000_000
    by_row = (size["cache"] + size["temporaries"]) / 4
    assert found["largest_batch"] == int((size["usable"] - size["weights"]) / by_row) // 2 * 2
    times = found["roofline_seconds"]
    one = 82_800 * (times["prefill"] + 512 * times["decode_step"]) / 3600  # 331,200 / 4 batches
    assert found["axis_run_hours"] == {
        "1.0": round(one, 1), "0.6": round(one / 0.6, 1), "0.3": round(one / 0.3, 1)}
    assert plan.plan(SMALL, "h100:1")["batch"] == 32
    assert plan.plan(SMALL, "h100:1")["context"] == 2048


def test_a_ratio_of_memory_has_four_digits():
    """Without any memory, nothing changes."""
    assert plan._ratio(2, 3) == 0.6667 and plan._ratio(5, 0) == 1.0


@pytest.mark.parametrize(("topology", "words"), [
    ("h200", "use chip:extents, such as v5e:4x4"), ("h200:x", "use chip:extents"),
    ("h200:2x", "use chip:extents"),
    ("v9:2", "supported chips are v5e, v5p, v6e, a100, h100, h200"),
    ("v5e:2x0", "every extent must be at least 1")])
def test_a_topology_that_cannot_be_read_is_named(topology, words):
    """With the form, the chips or the extents."""
    with pytest.raises(ValueError, match=rf"topology is {topology!r}; {words}"):
        chips.parse(topology)
