"""Keys of `config.json` that only other families read: ignored as in transformers."""

from __future__ import annotations

import json

import hf
import jax
import numpy as np
import pytest

import jaxpersona as jp

pytestmark = pytest.mark.usefixtures("compile_fast")

SLIDING, FULL = "sliding_attention", "full_attention"
ALL = {"sliding_window": 4, "layer_types": [SLIDING, FULL, SLIDING], "use_sliding_window": True,
       "sliding_window_pattern": 2, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5,
       "query_pre_attn_scalar": 3, "rope_local_base_freq": 10.0, "mlp_bias": True,
       "hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": True}
WINDOW = ("sliding_window", "layer_types")
OWN = {"llama": ("mlp_bias",), "mistral": WINDOW, "qwen2": (*WINDOW, "use_sliding_window"),
       "qwen3": (*WINDOW, "use_sliding_window"),
       "gemma2": (*WINDOW, "final_logit_softcapping", "attn_logit_softcapping",
                  "query_pre_attn_scalar", "hidden_activation", "use_bidirectional_attention"),
       "gemma3": (*WINDOW, "sliding_window_pattern", "final_logit_softcapping",
                  "attn_logit_softcapping", "query_pre_attn_scalar", "rope_local_base_freq",
                  "hidden_activation", "use_bidirectional_attention")}


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_the_logits_are_those_of_transformers_with_such_keys(family, tmp_path):
    """Rows are longer than the window, and each value would change the logits where it is read."""
    import torch

    foreign = {key: value for key, value in ALL.items() if key not in OWN[family]}
    hf.model(family, seed=4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    theirs = hf.architecture(family).from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager",
        trust_remote_code=False).eval()
    rows = hf.prompts([12, 7], 199)
    _, want = hf.residuals(theirs, rows)
    with pytest.warns(UserWarning, match=f"the family {family} does not read") as caught:
        model = jp.load(tmp_path)
    assert len(caught) == 1 and str(path) in str(caught[0].message)
    assert all(f"{key}=" in str(caught[0].message) for key in foreign)
    got = jax.jit(jp.forward)(model.params, model.config,
                              jp.batch([np.array(row) for row in rows])).logits
    for b, row in enumerate(rows):
        assert hf.distance(got[b, :len(row)], want[b, :len(row)]) <= 1e-4
