"""HLO parsing: kernels and collectives are counted once, even in loops and branches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpersona.planning import hlo

TEXT = """HloModule m

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %inner = f32[4]{0} fusion(%p), kind=kLoop, calls=%other
}

%body (p: (f32[4])) -> (f32[4]) {
  %x = bf16[2,8]{1,0} reduce-scatter(%p), dimensions={0}, metadata={op_name="jit(f)/layer1/dot"}
  %y = (bf16[4,8]{1,0}, pred[16]{0}) all-gather-start(%x), metadata={op_name="jit(f)/layer1/dot"}
  %z = bf16[4,8]{1,0} all-gather-done(%y)
  ROOT %f = f32[4]{0} fusion(%z), kind=kLoop, calls=%fused
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %r = f32[4]{0} all-reduce(%a), to_apply=%add, metadata={op_name="jit(f)/layer10/dot"}
  %w = (f32[4]{0}) while(%r), condition=%cond, body=%body
  ROOT %g = f32[4]{0} fusion(%w), kind=kLoop, calls=%fused
}
"""


def test_text_is_read():
    assert hlo.fusions(hlo.operations(TEXT)) == 1  # not inside a fusion or after the loop
    found = hlo.collectives(TEXT)
    assert [op.kind for op in found] == ["all-reduce", "reduce-scatter", "all-gather"]
    assert [op.bytes for op in found] == [16, 32, 64 + 16]
    assert hlo.reductions(hlo.by_layer(found, 1)) == 1  # the pair counts as one reduction
    assert [op.kind for op in hlo.by_layer(found, 10)] == ["all-reduce"]
    assert hlo.reductions(found) == 2
    assert [op.looped for op in found] == [False, True, True]


BRANCHES = """HloModule m

%deep (p: f32[4]) -> f32[4] {
  %c = f32[4]{0} collective-permute(%p), source_target_pairs={{0,1}}
  ROOT %f = f32[4]{0} fusion(%c), kind=kLoop, calls=%other
}

%yes (p: f32[4]) -> f32[4] {
  ROOT %k = f32[4]{0} call(%p), to_apply=%deep
}

%no (p: f32[4]) -> s4[8] {
  ROOT %g = s4[8]{0} all-to-all(%p), dimensions={0}
}

%last (p: f32[4]) -> f32[2] {
  %f = f32[4]{0} fusion(%p), kind=kLoop, calls=%other
  ROOT %e = f32[2]{0} all-gather(%f), dimensions={0}
}

%unused (p: f32[4]) -> f32[4] {
  ROOT %u = f32[4]{0} all-reduce(%p), to_apply=%add
}

%body (p: f32[4]) -> f32[4] {
  ROOT %b = f32[4]{0} conditional(%p, %p, %p), branch_computations={%yes, %no}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%a), condition=%cond, body=%body
  ROOT %t = f32[2]{0} conditional(%w, %w, %w), true_computation=%last, false_computation=%none
}
"""


def test_branches_and_calls_are_followed():
    found = {(op.kind, op.bytes, op.looped) for op in hlo.collectives(BRANCHES)}
    assert found == {("collective-permute", 16, True), ("all-to-all", 4, True),
                     ("all-gather", 8, False)}
    assert hlo.fusions(hlo.operations(BRANCHES)) == 1  # of the loop's branch


def test_only_an_all_gather_that_completes_a_reduce_scatter_is_not_counted():
    for kinds, wanted in ((("all-gather",), 1), (("all-gather", "all-reduce"), 2),
                          (("reduce-scatter", "all-gather", "all-gather"), 2),
                          (("reduce-scatter", "reduce-scatter", "all-gather"), 2)):
        assert hlo.reductions([hlo.Operation(kind, "", 4, False) for kind in kinds]) == wanted


def test_a_loop_s_collectives_are_found():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    held = jax.device_put(np.ones((8, 4), np.float32), NamedSharding(mesh, P("x")))

    @jax.jit
    def looped(x):
        def step(_, total):
            with jax.named_scope("layer0"):
                return total + x.sum(0) * total
        return jax.lax.fori_loop(0, 3, step, jnp.ones(4, jnp.float32))

    found = hlo.collectives(looped.lower(held).compile().as_text())
    assert hlo.reductions(found) == 1 and found[0].bytes == 16
