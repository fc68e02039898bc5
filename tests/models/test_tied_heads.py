"""Checkpoint files that disagree with the configuration about the head, the embedding or shards."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import hf, names, orbax, tensorfile
from jaxpersona.ckpts.loading import load

from jaxpersona.distributed.sharding import make_mesh
from jaxpersona.models.batch import batch

UNTIED = s.tiny_config(tied_embeddings=False)
TIED = s.tiny_config(tied_embeddings=True)


def rewrite(folder, change, dtypes=None):
    """Rewrite the tensors of a folder's single file."""
    entries, _, _ = tensorfile.read_header(folder / hf.SINGLE)
    values = change({name: tensorfile.read_slice(entry) for name, entry in entries.items()})
    shapes = {name: (value.dtype, value.shape) for name, value in values.items()}
    content = b"".join(bytes(p) for p in tensorfile.pieces(shapes, values.__getitem__, {}))
    (folder / hf.SINGLE).write_bytes(content)


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def logits(model):
    return np.asarray(s.run(model.params, model.config, batch(s.prompts((5, 9)))).logits)


def test_a_head_that_differs_is_used_though_the_configuration_says_tied(tmp_path):
    hf.save(tmp_path, s.random_params(UNTIED), UNTIED)
    wanted = logits(load(tmp_path))
    configure(tmp_path, tie_word_embeddings=True)
    for options in ({}, {"mesh": make_mesh(1, 2)}):
        with pytest.warns(UserWarning, match="tie_word_embeddings is true, but lm_head.weight "
                          "differs from model.embed_tokens.weight; both are used"):
            model = load(tmp_path, **options)
        assert not model.config.tied_embeddings
        assert s.relative(logits(model), wanted).max() < 1e-5
    with pytest.raises(ValueError, match="lm_head.weight: differs from .*"
                       "pass the configuration that read_config"):
        hf.load(tmp_path, TIED)
    with pytest.warns(UserWarning, match="differs"):
        hf.verify(tmp_path)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_head_that_is_the_embedding_s_second_name_is_no_other(tmp_path, narrow, recwarn,
                                                               monkeypatch):
    """Its dtype may differ, but a single different value makes it a separate head."""
    monkeypatch.setattr(tensorfile, "_PIECE", 400)  # compare 3,104 values in pieces of 100
    exact = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
                         s.random_params(TIED))
    hf.save(tmp_path, exact, TIED)

    def twice(values, place=None):
        head = values[names.EMBED].copy()
        if place is not None:
            head[place] += 1
        return {**values, names.HEAD: head.astype(jnp.bfloat16 if narrow else np.float32)}

    alone = load(tmp_path)
    rewrite(tmp_path, twice)
    model = load(tmp_path)
    assert model.config.tied_embeddings and model.fingerprint == alone.fingerprint
    assert not recwarn.list
    rewrite(tmp_path, lambda values: {**values, names.HEAD: values[names.EMBED][:48]})
    with pytest.raises(ValueError, match=r"lm_head.weight: shape \[48, 32\], expected \[97, 32\]"):
        load(tmp_path)
    rewrite(tmp_path, lambda values: twice(values, (96, 31)))
    with pytest.warns(UserWarning, match="differs"):
        assert not load(tmp_path).config.tied_embeddings


def test_a_tied_model_may_be_stored_under_the_head_s_name_alone(tmp_path, recwarn):
    hf.save(tmp_path, s.random_params(TIED), TIED)
    wanted = load(tmp_path)
    rewrite(tmp_path, lambda values: {
        (names.HEAD if name == names.EMBED else name): x for name, x in values.items()})
    for options in ({}, {"mesh": make_mesh(1, 2)}):
        assert load(tmp_path, **options).fingerprint == wanted.fingerprint
    assert hf.verify(tmp_path) and not recwarn.list
    configure(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="missing tensors: model.embed_tokens.weight"):
        load(tmp_path)


def test_a_single_file_is_read_before_a_left_over_index(tmp_path, recwarn):
    old, new = s.random_params(UNTIED, 1), s.random_params(UNTIED, 2)
    hf.save(tmp_path / "old", old, UNTIED, shard_bytes=30_000)
    hf.save(tmp_path / "new", new, UNTIED)
    wanted = load(tmp_path / "new").fingerprint
    assert load(tmp_path / "old").fingerprint != wanted
    for kept in (hf.INDEX, "model-*"):  # first the index alone, then also its shards
        for path in (tmp_path / "old").glob(kept):
            shutil.copy(path, tmp_path / "new")
        if kept == hf.INDEX:
            assert load(tmp_path / "new").fingerprint == wanted and not recwarn.list
            assert list(hf.verify(tmp_path / "new")) == [hf.SINGLE]
    with pytest.warns(UserWarning, match="contains both model.safetensors and the shards of .*"
                      "model-00001-of-.*; model.safetensors is read"):
        assert load(tmp_path / "new").fingerprint == wanted


def test_the_warning_about_a_left_over_index_comes_once_for_a_tied_model(tmp_path):
    hf.save(tmp_path, s.random_params(TIED), TIED, shard_bytes=30_000)
    hf.save(tmp_path / "single", s.random_params(TIED), TIED)
    shutil.copy(tmp_path / "single" / hf.SINGLE, tmp_path)
    with pytest.warns(UserWarning, match="contains both model.safetensors") as caught:
        load(tmp_path)
    assert len(caught) == 1


def test_an_index_that_names_the_single_file_is_followed(tmp_path, recwarn):
    hf.save(tmp_path, s.random_params(UNTIED), UNTIED)
    names = tensorfile.read_header(tmp_path / hf.SINGLE)[0]
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, hf.SINGLE)}))
    assert load(tmp_path).config == UNTIED and not recwarn.list


def test_two_kinds_of_checkpoint_in_one_folder_are_refused(tmp_path):
    orbax.save(tmp_path, s.random_params(UNTIED, 1), UNTIED)
    hf.save(tmp_path, s.random_params(UNTIED, 2), UNTIED)
    with pytest.raises(ValueError, match="contains both an Orbax checkpoint .params. and "
                       "model.safetensors; remove the outdated one"):
        load(tmp_path)
