"""Greedy generation of every family compared token by token with `generate` of transformers."""

import hf
import pytest
from jaxpersona.ckpts.loading import load

from jaxpersona.engine.generate import generate

SLIDE, FULL = "sliding_attention", "full_attention"
CASES = {
    "llama": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 9},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 30},
    "gemma3": {"sliding_window": 9, "query_pre_attn_scalar": 30,
               "layer_types": [SLIDE, FULL, SLIDE]},
}
NEW = 64
LENGTHS = [1, 2, 3, 5, 8, 13, 21, 30, 31, 32, 4, 6, 7, 9, 11, 16, 17, 24, 28, 29]


def _theirs(made, rows):
    """Generate in one left-padded batch; return each reply without its stop token."""
    import torch

    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    out = made.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    replies = out[:, width:].tolist()
    return [reply[: reply.index(1)] if 1 in reply else reply for reply in replies]


@pytest.mark.parametrize("family", CASES)
def test_greedy_tokens_equal_those_of_transformers(family, tmp_path):
    made = hf.model(family, **CASES[family])
    made.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.stop_ids == (1,) and model.tokenizer is None and not model.template
    rows = hf.prompts(LENGTHS, hf.SIZE["vocab_size"])
    ours = generate(model, rows, max_new_tokens=NEW, temperature=0.0, batch_size=len(rows))
    wanted = _theirs(made, rows)
    assert sum(map(len, wanted)) > NEW * len(rows) / 2, "the reference stops too early"
    assert [t.tolist() for t in ours.tokens] == wanted
