"""Every family compared with transformers: the residual after each block, and the logits."""

import functools

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpersona.captures import capture
from jaxpersona.interventions.where import everywhere
from jaxpersona.models.batch import batch, split
from jaxpersona.models.cache import init_cache
from jaxpersona.models.carry import Carry
from jaxpersona.models.forward import forward

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 3.0}
THETA = {"rope_type": "default", "rope_theta": 777.0}
SLIDE, FULL = "sliding_attention", "full_attention"


def _heads(queries: int, keys: int, width: int) -> dict:
    return {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": width}


# each family with 1, 2, 4 and 8 query heads per key head, tied and untied, and a head dimension
# other than D/N
CASES = {
    "llama": [
        _heads(4, 4, 12),
        _heads(4, 2, 16) | {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        _heads(4, 1, 8) | {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3},
        _heads(8, 1, 10) | {"rope_parameters": LLAMA3 | {"factor": 32.0}, "attention_bias": True},
        _heads(4, 2, 12) | {"rope_parameters": LINEAR, "mlp_bias": True},
    ],
    "mistral": [
        _heads(4, 4, 12) | {"sliding_window": None},
        _heads(4, 2, 16) | {"sliding_window": 7},
        _heads(4, 1, 8) | {"sliding_window": 7, "tie_word_embeddings": True},
        _heads(8, 1, 10) | {"sliding_window": 1, "rope_parameters": THETA},
        _heads(4, 2, 12) | {"sliding_window": 300, "rms_norm_eps": 1e-3},
    ],
    "qwen2": [
        _heads(4, 4, 12),
        _heads(4, 2, 12) | {"tie_word_embeddings": True, "rope_parameters": THETA},
        _heads(4, 1, 12) | {"use_sliding_window": True, "sliding_window": 7,
                            "max_window_layers": 1},
        _heads(8, 1, 6) | {"use_sliding_window": True, "sliding_window": 5,
                           "layer_types": [SLIDE, FULL, SLIDE]},
        _heads(4, 2, 12) | {"rms_norm_eps": 1e-3, "rope_parameters": LLAMA3},
    ],
    "qwen3": [
        _heads(4, 4, 12),
        _heads(4, 2, 16) | {"tie_word_embeddings": True, "rope_parameters": THETA},
        _heads(4, 1, 8) | {"attention_bias": True, "rms_norm_eps": 1e-3},
        _heads(8, 1, 10) | {"use_sliding_window": True, "sliding_window": 5,
                            "layer_types": [SLIDE, FULL, SLIDE], "tie_word_embeddings": True},
        _heads(4, 2, 16) | {"attention_bias": True, "rope_parameters": LINEAR},
        _heads(8, 2, 32) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
    "gemma2": [
        _heads(4, 4, 12) | {"tie_word_embeddings": True, "sliding_window": 7,
                            "query_pre_attn_scalar": 30},
        _heads(4, 2, 16) | {"tie_word_embeddings": True, "sliding_window": 7,
                            "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.5},
        _heads(4, 1, 8) | {"sliding_window": 5, "query_pre_attn_scalar": 12,
                           "attention_bias": True, "final_logit_softcapping": 2.0},
        _heads(8, 1, 10) | {"tie_word_embeddings": True, "sliding_window": 300,
                            "attn_logit_softcapping": None, "query_pre_attn_scalar": 5},
        _heads(4, 2, 16) | {"tie_word_embeddings": True, "sliding_window": 6,
                            "layer_types": [FULL, FULL, SLIDE], "query_pre_attn_scalar": 40,
                            "final_logit_softcapping": None, "rope_parameters": THETA},
    ],
    "gemma3": [
        _heads(4, 4, 12) | {"tie_word_embeddings": True, "sliding_window": 7,
                            "layer_types": [SLIDE, FULL, SLIDE], "query_pre_attn_scalar": 30},
        _heads(4, 2, 16) | {"tie_word_embeddings": True, "sliding_window": 7,
                            "layer_types": [SLIDE, SLIDE, FULL], "query_pre_attn_scalar": 16,
                            "rope_parameters": {SLIDE: THETA, FULL: LINEAR}},
        _heads(4, 1, 8) | {"sliding_window": 5, "query_pre_attn_scalar": 12,
                           "layer_types": [FULL, SLIDE, FULL], "final_logit_softcapping": 3.0},
        _heads(8, 1, 10) | {"tie_word_embeddings": True, "sliding_window": 300,
                            "query_pre_attn_scalar": 5, "rms_norm_eps": 1e-3},
        _heads(4, 2, 16) | {"tie_word_embeddings": True, "sliding_window": 6,
                            "query_pre_attn_scalar": 40, "attention_bias": True,
                            "layer_types": [FULL, FULL, SLIDE]},
    ],
}
# `make test-all` runs the others too
QUICK = {"llama": (1, 2, 4), "mistral": (0, 2, 3), "qwen2": (1, 2, 3), "qwen3": (2, 3, 4),
         "gemma2": (1, 2, 3, 4), "gemma3": (1, 2, 4)}
ALL = [pytest.param(f, c, id=f"{f}-{i}", marks=() if i in QUICK[f] else (pytest.mark.slow,))
       for f, cases in CASES.items() for i, c in enumerate(cases)]
LENGTHS = [33, 20, 7]
READ = capture.full(everywhere)


@functools.partial(jax.jit, static_argnames=("config",),
                   # halves the compile time
                   compiler_options={"xla_backend_optimization_level": 0})
def run(params, config, rows, cache=None, captured=None):
    out = forward(params, config, rows, capture=READ,
                  carry=Carry(cache=cache, captured=captured))
    return out.logits, out.captured, out.cache


def whole(params, config, rows):
    """Run a full forward pass; return logits [B, T, V] and residuals [B, L, T, D]."""
    logits, captured, _ = run(params, config, rows)
    return np.asarray(logits), np.asarray(captured["full"].value)


def theirs(made, rows):
    """Return the logits and residuals of transformers."""
    stream, logits = hf.residuals(made, rows)
    return logits, np.moveaxis(stream, 0, 1)


def worst(ours, wanted):
    """Return the largest relative distance over valid tokens, for any row and layer."""
    far = [hf.distance(ours[0][b, :n], wanted[0][b, :n]) for b, n in enumerate(LENGTHS)]
    far += [hf.distance(ours[1][b, i, :n], wanted[1][b, i, :n]) for b, n in enumerate(LENGTHS)
            for i in range(wanted[1].shape[1])]
    return max(far)


@pytest.mark.parametrize(("family", "fields"), ALL)
def test_forward_equals_transformers_and_its_own_pieces(family, fields, tmp_path):
    made = hf.model(family, seed=len(str(fields)), **fields)
    rows = hf.prompts(LENGTHS, hf.SIZE["vocab_size"])
    wanted = theirs(made, rows)
    params, config = hf.params(made, tmp_path)
    ours = whole(params, config, batch(rows))
    assert wanted[0].std() > 0.3, "the reference logits are too close to uniform"
    assert (far := worst(ours, wanted)) <= 1e-4

    # a prefill of 16 tokens, a second chunk of 16, then one decoded token
    cache, captured, pieces = init_cache(config, len(rows), 36), READ.init(config, 3, 36), []
    for piece in [*split(batch(rows), 16)[:2], split(batch(rows), 1)[32]]:
        logits, captured, cache = run(params, config, piece, cache, captured)
        pieces.append(np.asarray(logits))
    steps = np.concatenate(pieces, 1), np.asarray(captured["full"].value)
    assert (apart := worst(steps, ours)) <= 1e-5
    print(f"{family}: against transformers {far:.1e}, in pieces {apart:.1e}")


@pytest.mark.parametrize("family", CASES)
def test_bfloat16_is_as_near_to_the_truth_as_transformers(family, tmp_path):
    import torch

    # the reference computes in float32 with the weights rounded to bfloat16
    made = hf.cast(hf.model(family, gain=0.8, **CASES[family][1]), torch.bfloat16)
    rows = hf.prompts(LENGTHS, hf.SIZE["vocab_size"])
    params, config = hf.params(made, tmp_path)
    assert params.embed_vd.dtype == jnp.bfloat16
    low = theirs(made, rows)
    truth = theirs(hf.cast(made, torch.float32), rows)
    ours, peer = worst(whole(params, config, batch(rows)), truth), worst(low, truth)
    print(f"{family}: bfloat16 {ours:.1e}, of transformers {peer:.1e}")
    assert ours <= min(2e-2, 1.25 * peer)
