"""The kernels compiled for TPUs: what a cap adds to a step, and what a long prompt takes."""

import importlib.util
import pathlib
import sys

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.planning import chips, hlo, plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed, so nothing is compiled for a TPU here: "
           "pip install 'jaxpersona[tpu]'")
BENCH = pathlib.Path(__file__).parents[2] / "bench"
SMALL = s.tiny_config(vocab_size=256, d_model=256, n_heads=4, n_kv_heads=2, head_dim=128, d_ff=512,
                      max_context=4096, windows=(512, None, 512), attn_softcap=50.0)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import tpu_kernels

    yield tpu_kernels
    for name in ("common", "tpu_kernels"):
        sys.modules.pop(name, None)


def mesh(chip):
    return plan._mesh({"data": 1, "model": 1}, chips.tpu_devices(f"{chip}:1x1"), SMALL)


@pytest.mark.parametrize("chip", ["v5e", pytest.param("v6e", marks=pytest.mark.slow)])
def test_a_cap_adds_at_most_one_kernel_per_layer(bench, chip):
    """A decode step with all layers capped, each row with its own cap."""
    rng = np.random.default_rng(0)
    cap = jp.cap(rng.normal(size=(8, 256)), layers=range(3), floor=0.0, rows=range(8))
    count = {}
    for name, form, edits in (("plain", "xla", None), ("xla", "xla", cap),
                              ("pallas", "pallas", cap)):
        program = bench.decode(SMALL, mesh(chip), 8, 256, interventions=edits, residual=form)
        count[name] = bench.per_layer(program, 3)
        calls = [op for op in hlo.by_layer(hlo.operations(program.as_text()), 1)
                 if op.kind == "custom-call" and "residual_site" in op.scope]
        assert len(calls) == (name == "pallas")
    assert count["pallas"] <= count["plain"] + 1 < count["xla"] + 1


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_splash_attention_writes_no_scores(bench, chip):
    """A long prompt of a model with windows and a soft-cap, with a new cache."""
    programs = {name: bench.prefill(SMALL, mesh(chip), 1, 2048, attention=name)
                for name in ("xla", "splash", "auto")}
    written = {name: bench.score_bytes(program, SMALL, 2048) for name, program in programs.items()}
    assert written["xla"] >= 2 * 4 * 2048 * 2048  # at least one array of scores in bfloat16
    assert written["splash"] == written["auto"] == 0
    assert bench.sizes(programs["splash"]) == bench.sizes(programs["auto"])
