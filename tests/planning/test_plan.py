"""Plans: arithmetic compared with manual counts, TPU compilation and error messages."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
import support as s

from jaxpersona.captures import capture
from jaxpersona.distributed import sharding
from jaxpersona.models.config import replace
from jaxpersona.models.params import init_params, layout
from jaxpersona.models.presets import preset
from jaxpersona.planning import arithmetic, chips, hlo, plan

SMALL = s.tiny_config(vocab_size=256, d_model=256, n_heads=8, n_kv_heads=4, head_dim=128, d_ff=512,
                      n_layers=4, max_context=2048)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed, so nothing is compiled for a "
                                         "TPU here: pip install 'jaxpersona[tpu]'")


def run(capsys, *arguments):
    code = s.run_command(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_bytes_are_those_of_the_arrays():
    """Per-chip bytes equal those of arrays on a real mesh of the same size."""
    import jax

    mesh = sharding.fit(sharding.make_mesh(data=1, model=8), SMALL)
    params = init_params(SMALL, jax.random.key(0))
    held = jax.tree.map(
        lambda p, spec: jax.device_put(p, sharding.weight_sharding(spec.axes, spec.shape, mesh)),
        params, layout(SMALL))
    mine = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(held)) // 2  # float32
    found = plan.plan(SMALL, "h200:8", batch=16, context=256)
    assert found["mesh"] == dict(mesh.shape) == {"data": 1, "model": 4, "group": 2}
    assert found["bytes_per_chip"]["weights"] == mine
    # one key/value head per chip, replicated in groups of two
    assert found["bytes_per_chip"]["cache"] == 2 * 4 * 16 * 1 * 256 * 128 * 2
    assert found["fits"] and not found["compiled"] and found["collectives_per_layer"] is None


def test_roofline_is_the_formula():
    """Llama 3.1 8B on an H200: 4,800 GB/s, 989e12 FLOP/s; 1,536 prompt tokens and half of 512."""
    config, chip = preset("llama-3.1-8b"), chips.CHIPS["h200"]
    shapes = plan.Shapes(batch=32, width=1536, slots=2048)
    found = plan.seconds(config, plan._mesh({"data": 1, "model": 1}, None, config), shapes, chip)
    # weights without the input embedding; 131,072 bytes of keys and values per token
    step = (15_009_849_344 + 32 * 1792 * 131_072) / 4800e9
    prefill = 32 * (2 * 6_979_588_096 * 1536 + 262_144 * 1536**2) / 989e12
    assert found == {"decode_step": pytest.approx(step), "decode_sums": 0,
                     "prefill": pytest.approx(prefill), "prefill_sums": 0}
    hours = plan.run_hours(found, shapes, 0.5)
    assert hours == pytest.approx(331_200 / 32 * (prefill + 512 * step) / 0.5 / 3600)
    # 80 full batches of 4,096 rollouts and one that is not full
    hours = plan.run_hours(found, plan.Shapes(4096, 1536, 2048), 0.5)
    assert hours == pytest.approx(81 * (prefill + 512 * step) / 0.5 / 3600)
    # replies have 512 tokens even where fewer slots are for the reply
    hours = plan.run_hours(found, plan.Shapes(32, 192, 256), 0.5)
    assert hours == pytest.approx(331_200 / 32 * (prefill + 512 * step) / 0.5 / 3600)


@pytest.mark.parametrize(("sizes", "rows", "model"), [
    ({"data": 2, "model": 4}, 16, 4), ({"data": 8, "model": 1}, 4, 1), ({"data": 1, "model": 8},
                                                                        32, 8),
    ({"data": 2, "fsdp": 2, "model": 2}, 8, 2), ({"data": 1, "model": 16}, 32, 16),
])
def test_roofline_of_a_mesh_is_the_formula(sizes, rows, model):
    """Data and fsdp shard rows; model shards weights, heads and matmuls.

    The model has eight key/value heads; 16 chips hold each of them twice.
    """
    config, chip = preset("llama-3.1-8b"), chips.CHIPS["h200"]
    shapes = plan.Shapes(batch=32, width=1536, slots=2048)
    found = plan.seconds(config, plan._mesh(sizes, None, config), shapes, chip)
    # two ring all-reduces per layer, each moving 2 (n - 1) / n of 4,096 bfloat16 per row
    sums = 2 * 32 * 2 * (model - 1) / model * rows * 4096 * 2 / 450e9
    step = (15_009_849_344 / model + rows * 1792 * 131_072 / min(model, 8)) / 4800e9
    prefill = rows * (2 * 6_979_588_096 * 1536 + 262_144 * 1536**2) / model / 989e12
    assert found["decode_sums"] == pytest.approx(sums)
    assert found["prefill_sums"] == pytest.approx(1536 * sums)
    assert found["decode_step"] == pytest.approx(step + sums)
    assert found["prefill"] == pytest.approx(prefill + 1536 * sums)


def test_a_step_of_many_rows_is_bound_by_its_products():
    config, chip = preset("llama-3.1-8b"), chips.CHIPS["h200"]
    shapes = plan.Shapes(batch=4096, width=96, slots=128)
    found = plan.seconds(config, plan._mesh({"data": 1, "model": 1}, None, config), shapes, chip)
    step = 4096 * 112 * 131_072 / 4800e9 + 2 * 4096 * 7_504_924_672 / 989e12
    assert found["decode_step"] == pytest.approx(step)
    # a sliding window limits the keys and values that a row reads
    gemma, shapes = preset("gemma-2-27b"), plan.Shapes(batch=1, width=7680, slots=8192)
    found = plan.seconds(gemma, plan._mesh({"data": 1, "model": 1}, None, gemma), shapes, chip)
    read = 54_454_256_640 + 23 * (4096 + 7936) * 8_192
    assert found["decode_step"] == pytest.approx(read / 4800e9)


def test_a_model_too_large_says_by_how_much():
    found = plan.plan(preset("llama-3.3-70b"), "a100:1", batch=1)
    wanted, room = (found["bytes_per_chip"][name] for name in ("total", "usable"))
    assert not found["fits"] and found["short_by"] == wanted - room > 60e9
    assert found["largest_batch"] == 0


@pytest.mark.parametrize("ways", [3, 7, 8])
def test_the_largest_batch_is_one_that_plan_accepts_and_that_fits(ways):
    config = preset("llama-3.1-8b")

    def of(batch):
        return plan.plan(config, f"h200:{ways}", batch=batch, context=3000,
                         mesh={"data": ways, "model": 1})

    largest = of(ways)["largest_batch"]
    assert largest % ways == 0 and of(largest)["fits"] and not of(largest + ways)["fits"]


def test_bytes_a_chip_stay_flat_as_chips_and_batch_grow():
    small, large = (plan.plan(preset("llama-3.3-70b"), f"h200:{n}", batch=2 * n)
                    for n in (16, 256))
    assert small["bytes_per_chip"] == large["bytes_per_chip"]
    assert large["mesh"]["data"] == 16 * small["mesh"]["data"]


@pytest.mark.parametrize(("model", "batch", "compiled"), [
    # bytes that XLA allocates for an H200 at context 2,048 (bench/results/ahead-*.json)
    ("qwen3-8b", 32, 3_649_073_824), ("qwen3-32b", 32, 6_568_331_360),
    ("llama-3.1-8b", 32, 4_051_723_872), ("gemma-2-27b", 32, 8_178_918_208),
    ("gemma-2-9b", 8, 1_094_736_640),
])
def test_a_prefill_s_temporaries_are_near_what_a_gpu_s_compiler_takes(model, batch, compiled):
    found = plan.plan(preset(model), "h200:1", batch=batch)["bytes_per_chip"]
    assert found["temporaries"] == pytest.approx(compiled, rel=0.1)


@pytest.mark.parametrize(("sizes", "wanted"), [
    # two bfloat16 copies of the queries, and the scores of 512 queries
    ({"data": 8, "model": 1}, 4 * 1536 * 16_384 + 6 * 4 * 32 * 512 * 2048),
    ({"data": 1, "model": 2}, 32 * 1536 * 8_192 + 6 * 32 * 16 * 512 * 2048),
    # with two query heads a chip, the MLP needs more: gate and up of 14,336 / 16, three residuals
    ({"data": 1, "model": 16}, 32 * 1536 * 2 * (2 * 896 + 3 * 4096)),
], ids=str)
def test_a_mesh_of_gpus_needs_room_for_the_scores_of_a_chunk(sizes, wanted):
    """cuDNN attention does not support meshes."""
    config, shapes = preset("llama-3.1-8b"), plan.Shapes(batch=32, width=1536, slots=2048)
    mesh = plan._mesh(sizes, None, config)
    assert plan.activation_bytes(config, mesh, shapes, chips.CHIPS["h200"]) == wanted


def test_what_cannot_be_planned_is_refused(monkeypatch):
    monkeypatch.setattr(chips, "tpu_devices", lambda topology: [None] * 3)
    for topology, given, wanted in (
            ("v5e:2x2", {}, "libtpu lists 3 devices for the 4 chips of topology 'v5e:2x2'"),
            ("h200:1", {"batch": 2.5}, "batch is 2.5, context is 2048; both must be ints"),
            ("h200:1", {"context": "2"}, "batch is 32, context is '2'; both"),
            ("h200:1", {"batch": 0}, "batch is 0 and context is 2048; batch must be at least 1"),
            ("h200:8", {"cap_layers": [99]}, r"layers is \[99\], which is out of range"),
            ("h200:8", {"cap_layers": "abc"}, "layers is 'abc'"),
            ("h200:8", {"mesh": {"data": 4}}, "mesh data=4 needs 4 chips; the topology has 8"),
            (8, {}, "topology is 8; use chip:extents")):
        with pytest.raises(ValueError, match=wanted):
            plan.plan(SMALL, topology, **given)


def test_a_plan_may_fill_the_context():
    config = preset("qwen2.5-0.5b")
    assert plan.plan(config, "h200:1", batch=1, context=config.max_context)["context"] == 32_768
    with pytest.raises(ValueError, match="the model supports at most 32768"):
        plan.plan(config, "h200:1", batch=1, context=config.max_context + 1)


def test_a_tpu_without_its_compiler_is_reckoned_with_all_scores(monkeypatch):
    monkeypatch.setattr(chips, "tpu_devices", lambda topology: None)
    found = plan.plan(preset("qwen3-1.7b"), "v5e:1x1", batch=32)
    assert not found["compiled"] and not found["fits"]
    assert found["bytes_per_chip"]["temporaries"] > 2 * 4 * 32 * 16 * 512 * 2048


@pytest.mark.slow
@needs_libtpu
def test_a_tpu_s_compiler_counts_what_a_cap_adds(monkeypatch):
    monkeypatch.setattr(plan, "DEPTHS", (1, 2))
    found = plan.plan(replace(SMALL, n_layers=5), "v5e:2x2", batch=8, context=256,
                      cap_layers=(1, 2, 3), mesh={"data": 1, "model": 4})
    assert found["compiled"] and found["fits"]
    assert found["collectives_per_layer"] == 2 and found["added_collectives"] == 0
    assert found["added_fusions_per_layer"] <= 2
    assert found["added_fusions_once"] <= 6
    assert found["added_bytes"] > 0 and 0.99 <= found["temporaries_ratio"] <= 1.01
    assert set(found["temporaries_by_program"]) == {"prefill", "decode"}
    assert "optimal" not in json.dumps(found)


def test_int8_weights_are_counted_with_their_scales():
    """A byte per number of a matrix, four per output channel; norms stay bfloat16."""
    config = preset("llama-3.3-70b")
    mesh = plan._mesh({"data": 1, "model": 8}, None, config)
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28_672
    scales = 4 * (8192 + 2 * 1024 + 2 * 28_672)  # of sharded channels
    whole = 4 * 2 * 8192  # of the outputs of attention and MLP, on every chip
    tables = 2 * 128_256 * (8192 + 4)
    norms = 2 * 8192 * (2 * 80 + 1)
    assert arithmetic.weight_bytes(config, mesh, "int8") == (
        80 * (layer + scales) + tables) // 8 + 80 * whole + norms
    assert arithmetic.step_bytes(config, "int8") == (
        80 * (layer + scales + whole) + tables // 2 + norms)
    assert arithmetic.step_bytes(config, "bfloat16") == config.step_bytes(2)
    tied = preset("qwen3-1.7b")  # a step reads the embedding as the head
    assert tied.tied_embeddings and arithmetic.step_bytes(tied, "int8") == (
        arithmetic.weight_bytes(tied, plan._mesh({"data": 1, "model": 1}, None, tied), "int8"))
    with pytest.raises(ValueError, match="dtype is 'int4'; it must be one of bfloat16, int8"):
        arithmetic.weight_bytes(config, mesh, "int4")


@needs_libtpu
def test_a_tpu_s_decode_writes_no_float_copy_of_an_int8_weight():
    """Its temporaries, and every float array that it writes, are smaller than one weight."""
    config = replace(SMALL, n_layers=2, d_model=512, d_ff=8192, vocab_size=8192)
    mesh = plan._mesh({"data": 1, "model": 1}, chips.tpu_devices("v5e:1x1"), config)
    params = arithmetic.abstract_weights(config, mesh, "int8")
    program = plan.lowered(params, config, plan.Shapes(8, 96, 128), ())[1].compile()
    weight = 2 * 8192 * 512  # in bfloat16
    assert program.memory_analysis().temp_size_in_bytes < weight
    written = [op for op in hlo.operations(program.as_text()) if op.kind != "parameter"]
    # these convert nothing; an asynchronous copy of an int8 weight has source and destination
    kinds = ("while", "tuple", "get-tuple-element", "bitcast", "copy")
    assert max(op.bytes for op in written if op.kind not in kinds) < weight


@needs_libtpu
def test_what_a_tpu_cannot_hold_is_measured_not_an_error(monkeypatch):
    monkeypatch.setattr(plan, "DEPTHS", (1, 2))
    wide = replace(SMALL, n_layers=2, d_ff=2**17)
    found = plan.plan(wide, "v5e:2x2", batch=512, context=2048, mesh={"data": 1, "model": 4})
    assert not found["fits"] and found["short_by"] > 1e9


@pytest.mark.parametrize(("arguments", "wanted"), [
    (("--topology", "v5e"), "use chip:extents"),
    (("--topology", "v9x:2x2"), "supported chips are v5e"),
    (("--topology", "h200:0"), "every extent"),
    (("--topology", "h200:8", "--model", "random:none"), "preset 'none' is unknown"),
    (("--topology", "h200:8", "--model", "nowhere/else"), "no such folder"),
    (("--topology", "h200:8", "--model", "x" * 300), "no such folder"),
    (("--topology", "h200:8", "--mesh", "rows=2"), "give sizes of data"),
    (("--topology", "h200:8", "--mesh", "data=2,model=2"), "needs 4 chips; the topology has 8"),
    (("--topology", "h200:8", "--batch", "3", "--mesh", "data=8"),
     "batch (--batch) is 3, but the mesh divides rows into 8 shards; use a multiple of 8"),
    (("--topology", "h200:8", "--context", "1"), "context is 1; batch must be at least 1"),
    (("--topology", "h200:8", "--context", "9999999"), "the maximum of random:llama-3.3-70b is"),
    (("--topology", "h200:8", "--cap", "70:90"), "out of range; layers must be in 0…79"),
])
def test_mistakes_are_one_line(capsys, arguments, wanted):
    code, _, said = run(capsys, *arguments)
    lines = [line for line in said.splitlines() if line]
    assert code == 2 and len(lines) == 1 and wanted in lines[0], said


@needs_libtpu
@pytest.mark.parametrize(("topology", "count"), [("v5e:1x1", 1), ("v6e:2x1", 2), ("v5e:2x4", 8)])
def test_a_machine_may_have_fewer_chips_than_a_host(topology, count):
    assert len(chips.tpu_devices(topology)) == count


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "mesh", "reads"), [
    ("v5e:2x2", {"data": 2, "model": 2}, True), ("v5e:2x2", {"data": 2, "model": 2}, False),
    ("v5e:1x1", {"data": 1, "model": 1}, False), ("v5e:1x1", {"data": 1, "model": 1}, True)])
def test_a_decode_turns_no_buffer_over(topology, mesh, reads, monkeypatch):
    """With several key/value heads per chip, a decode step transposes no buffer.

    This includes the cache and the buffers of per-token captures (here, `full` is as large as the
    cache).
    """
    config, shapes = replace(SMALL, n_layers=2), plan.Shapes(32, 768, 1024)
    placed = plan._mesh(mesh, chips.tpu_devices(topology), config)
    if reads:
        directions = np.random.default_rng(0).normal(size=(3, config.d_model))
        readings = capture.full() | capture.projections(directions) | capture.norms()
        monkeypatch.setattr(plan, "Capture", lambda: readings)
    found = plan.compile_for(config, placed, shapes, ())["plain"]
    cache = plan.cache_bytes(config, placed, shapes)
    written = [op for op in found.operations if op.looped and "scatter" in op.scope]
    assert sum(op.bytes == cache // 4 for op in written) == 4  # keys and values of two layers
    assert not [op for op in found.operations
                if op.kind == "copy" and not op.looped and op.bytes >= cache // 4]
    assert found.decode_temporaries < cache / 2


@needs_libtpu
def test_libtpu_s_refusal_is_one_line(capsys):
    code, _, said = run(capsys, "--topology", "v5e:3x5")
    assert code == 2 and said.count("\n") == 1 and "which libtpu does not support" in said


def test_a_missing_libtpu_is_named_with_its_remedy(capsys, monkeypatch):
    monkeypatch.setattr(chips, "tpu_devices", lambda topology: None)
    ask = ("--model", "random:qwen3-8b", "--cap", "20:28")
    code, said, _ = run(capsys, "--topology", "v5e:2x4", *ask)
    assert code == 0 and said.count("libtpu is not installed: pip install 'jaxpersona[tpu]'") == 2
    code, said, _ = run(capsys, "--topology", "h200:8", *ask)
    assert code == 0 and "libtpu" not in said and "no compiler was used" in said


def test_a_step_that_exceeds_the_memory_is_not_a_missing_libtpu(capsys, monkeypatch):
    from jaxpersona.cli.plan import card

    monkeypatch.setattr(chips, "tpu_devices", lambda topology: None)

    _, said, _ = run(capsys, "--topology", "v5e:2x4", "--model", "random:qwen3-8b", "--cap",
                     "20:28", "--json")
    found = json.loads(said.splitlines()[-1])
    text = "\n".join(card(found | {"compiled": True, "added_collectives": None}))
    assert "exceeds the memory of a chip" in text and "libtpu" not in text


def test_the_command_prints_a_card_or_json(capsys):
    ask = ("--topology", "h200:8", "--model", "random:qwen3-8b", "--cap", "20:28")
    code, said, _ = run(capsys, *ask)
    assert code == 0 and "fits: " in said
    assert "chips: 8; mesh: data=1 × model=8\n" in said
    assert said.splitlines()[-1] == "all times are estimates, not measurements"
    code, said, _ = run(capsys, *ask, "--json")
    found = json.loads(said)
    assert found["chips"] == 8 and found["cap"] == list(range(20, 28))
    assert set(found["axis_run_hours"]) == {"1.0", "0.6", "0.3"}
    # the whole context, and every option
    code, said, _ = run(capsys, *ask, "--batch", "16", "--context", "40960", "--mesh",
                        "data=2,model=4", "--dtype", "int8", "--json")
    found = json.loads(said)
    assert (found["batch"], found["context"], found["dtype"]) == (16, 40960, "int8")
    assert found["model"] == "random:qwen3-8b" and found["mesh"]["data"] == 2


def test_a_card_has_the_numbers_of_its_plan():
    from jaxpersona.cli.plan import card

    gb = {"total": 99.5, "usable": 90, "weights": 70, "cache": 20, "temporaries": 9.5}
    found = {
        "model": "m", "topology": "v5e:2x4", "chips": 8, "mesh": {"data": 2, "model": 4},
        "batch": 16, "context": 2048, "prompt": 1536, "dtype": "int8", "compiled": True,
        "fits": False, "short_by": 9_500_000_000, "largest_batch": 8, "collectives_per_layer": 2,
        "bytes_per_chip": {name: int(n * 1e9) for name, n in gb.items()}, "cap": [3, 4, 5],
        "added_collectives": 0, "added_fusions_per_layer": 1.5, "added_fusions_once": 3.0,
        "added_bytes": 2_500_000, "temporaries_ratio": 1.01, "chip": {"source": "a sheet"},
        "roofline_seconds": {"decode_step": 0.0125, "decode_sums": 0.0015, "prefill": 3.25,
                             "prefill_sums": 0.75},
        "axis_run_hours": {"1.0": 10.5, "0.3": 35.0}}
    lines = card(found)
    assert lines[:5] == [
        "m on v5e:2x4; chips: 8; mesh: data=2 × model=4",
        "batch 16, context 2048, prompts of 1536 tokens",
        "does not fit, by 9.50 GB: 99.50 of 90.00 GB per chip: int8 weights 70.00, cache 20.00 "
        "(arithmetic), temporaries 9.50 (compiler)",
        "largest batch: 8 (extrapolated linearly)",
        "collective reductions in a decode step: 2 per layer (compiler)"]
    assert ("(number of layers: 3) adds to each decode step (compiler): collectives: 0; kernels "
            "per capped layer: 1.5; other kernels: 3; memory traffic: 2.5 MB.") in lines[5]
    assert lines[6].endswith(
        "a sheet): decode step 12.50 ms, of which collective reductions take 1.50 ms; prefill "
        "3.25 s, of which collective reductions take 0.75 s")
    assert lines[7].endswith("10.5 at 100% of the roofline, 35.0 at 30% of the roofline")
