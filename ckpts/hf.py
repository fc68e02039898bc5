"""Load, verify and save Hugging Face folders: config.json and safetensors weights.

Tensors are read without PyTorch, at most a few at a time, and each shard is copied directly to its
devices, so host memory never contains a second copy of the whole model. All errors in the index and
the headers are reported together, before the weights are loaded.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxpersona.ckpts import names, tensorfile
from jaxpersona.ckpts.names import EMBED, HEAD
from jaxpersona.ckpts.shards import INDEX, SINGLE, read_entries, some
from jaxpersona.ckpts.source import Progress, load_params
from jaxpersona.ckpts.tensorfile import DTYPES, Entry, parse_dtype

from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json, require_file, require_folder
from jaxpersona.models.config import ModelConfig, replace
from jaxpersona.models.families import from_hf, to_hf
from jaxpersona.models.params import Params

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

ADAPTER = "adapter_config.json"


def read_config(folder: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a folder's config.json.

    If `tie_word_embeddings` is true but the weights contain an output head that differs from the
    embedding, the returned configuration is untied, as in transformers, and a warning is issued.

    Returns:
      The configuration, and the contents of config.json as a dict.

    Raises:
      UserError: the folder or config.json is missing, config.json is malformed, or the model is
        not supported.
    """
    folder = pathlib.Path(folder)
    require_folder(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: {_without_config(folder)}")
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict):
        raise UserError(f"{folder / 'config.json'}: contains a {type(raw).__name__}, not a JSON "
                        "object")
    try:
        config = from_hf(raw, place=str(folder / "config.json"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    # no warning here: `load` reads the entries again and warns about ignored shards
    if config.tied_embeddings and _has_other_head(read_entries(folder, warn=False)[0]):
        warnings.warn(f"{folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBED}; "
                      "both are used, as in transformers. To silence this warning, set "
                      f"tie_word_embeddings to false in config.json; to tie them, remove {HEAD}",
                      UserWarning, stacklevel=3)
        config = replace(config, tied_embeddings=False)
    return config, raw


def _has_other_head(entries: Mapping[str, Entry]) -> bool:
    """Return whether the embedding and the output head have the same shape but different values."""
    embed, head = entries.get(EMBED), entries.get(HEAD)
    if embed is None or head is None or embed.shape != head.shape:
        return False  # `load` raises an error for different shapes
    if not {embed.dtype, head.dtype} <= set(DTYPES):
        return False
    pairs = zip(tensorfile.read_pieces(embed), tensorfile.read_pieces(head), strict=True)
    return any(not np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
               for a, b in pairs)


def _without_config(folder: pathlib.Path) -> str:
    """Return the error message for a folder without config.json, with a remedy if there is one."""
    path = folder / ADAPTER
    if path.exists():
        raw = read_json(path)
        raw = raw if isinstance(raw, dict) else {}
        base, kind = raw.get("base_model_name_or_path"), raw.get("peft_type")
        of = f" of {base!r:.200}" if isinstance(base, str) and base else ""
        if kind in (None, "LORA"):
            return (f"a LoRA adapter{of}, not a model ({ADAPTER} without config.json); load its "
                    f"base model with this folder as the adapter: load(BASE, adapter=FOLDER), or "
                    "--model BASE --adapter FOLDER")
        return (f"a PEFT adapter ({kind!r:.40}){of}, not a model ({ADAPTER} without config.json); "
                "merge it into its base with peft's AutoPeftModelForCausalLM.from_pretrained("
                "FOLDER).merge_and_unload().save_pretrained(NEW), save the tokenizer there too, "
                "and load NEW")
    if (folder / "params.json").exists():
        return ("not in the Hugging Face layout (params.json without config.json is the original "
                "release layout); convert it with transformers, or load the model from the "
                "Hugging Face Hub")
    if found := sorted(path.name for path in folder.glob("*.gguf")):
        return f"not a model folder (no config.json); to load {found[0]}, give the file's path"
    return "not a model folder (no config.json)"


def load(folder: str | pathlib.Path, config: ModelConfig | None = None, *,
         dtype: DTypeLike | None = None,
         mesh: Mesh | None = None, progress: Progress | None = None) -> Params:
    """Load the parameters of a model folder.

    Args:
      folder: a folder with `model.safetensors`, or with shards and their index.
      config: the model configuration; read from the folder if None.
      dtype: the dtype to cast to, float32, bfloat16 or float16; None keeps the stored dtypes.
      mesh: the mesh over which to shard the parameters; each process reads only its own shards.
      progress: called with (bytes read so far, total bytes).

    Raises:
      UserError: `dtype` or the model is not supported, the mesh does not fit the model, or a file
        is missing or invalid; one message lists every error in the index and the headers.
    """
    folder = pathlib.Path(folder)
    if config is None:
        config, _ = read_config(folder)
    target = None if dtype is None else parse_dtype(dtype)
    return load_params(open_source(folder, config), config, dtype=target, mesh=mesh,
                       progress=progress)


def open_source(folder: pathlib.Path, config: ModelConfig) -> SafetensorsSource:
    """Check the headers of a folder's weight files; return a `TensorSource` for the tensors.

    Raises:
      UserError: the files are invalid; one message lists every error.
    """
    entries, faults = _tensors(folder, config)
    _refuse(folder, faults)
    return SafetensorsSource(entries)


class SafetensorsSource:
    """A `source.TensorSource` for tensors in safetensors files."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries

    def size(self, name: str) -> int:
        """Return the size of a tensor in the file, in bytes (see `TensorSource.size`)."""
        return self.entries[name].size

    def read(self, name: str, index: tuple[slice, ...] | None,
             dtype: np.dtype | None) -> np.ndarray:
        """Read a tensor or a part of it (see `TensorSource.read`).

        Raises:
          UserError: the file cannot be read, or is shorter than its header declares.
        """
        entry = self.entries[name]
        dtype = dtype or DTYPES[entry.dtype]
        if index is None:
            return tensorfile.read_as(entry, dtype)
        part = tensorfile.read_slice(entry, index)
        if part.dtype == dtype:
            return part
        out = tensorfile.aligned(part.shape, dtype)
        np.copyto(out, part, casting="unsafe")
        return out


def verify(folder: str | pathlib.Path, sha256: Mapping[str, str] | None = None) -> dict[str, int]:
    """Check a model folder without loading the weights.

    The checks cover config.json, the index, and the tensors' names, shapes, dtypes and byte ranges.

    Args:
      folder: the model folder.
      sha256: the expected hexadecimal digests of files, by file name; None checks no digests.

    Returns:
      The size in bytes of every weight file, by name.

    Raises:
      UserError: the folder is invalid; if config.json is valid, one message lists every error.
    """
    folder = pathlib.Path(folder)
    config, _ = read_config(folder)
    entries, faults = _tensors(folder, config)
    for name, wanted in (sha256 or {}).items():
        try:
            require_file(folder / name)
            with open(folder / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            faults.append(f"{name}: not readable ({error.strerror})")
            continue
        except ValueError as error:
            faults.append(str(error))
            continue
        if digest != wanted.lower():
            faults.append(f"{name}: sha256 is {digest}, expected {wanted}")
    _refuse(folder, faults)
    return {path.name: path.stat().st_size for path in sorted({e.path for e in entries.values()})}


def _tensors(folder: pathlib.Path, config: ModelConfig) -> tuple[dict[str, Entry], list[str]]:
    """Return the entries of a folder's tensors by name, and a list of all errors."""
    entries, faults = read_entries(folder)
    if config.tied_embeddings and EMBED not in entries and HEAD in entries:
        entries[EMBED] = entries[HEAD]  # some writers store the tied weight only as the head
    if entries or not faults:  # without entries, every tensor would be listed as missing
        faults += _mismatches(entries, config)
    if not faults and config.tied_embeddings and _has_other_head(entries):
        faults.append(f"{HEAD}: differs from {EMBED}, but config has tied_embeddings=True; "
                      "pass the configuration that read_config returns")
    return entries, faults


def _refuse(folder: pathlib.Path, faults: list[str]) -> None:
    if len(faults) == 1:  # one line
        place = "" if faults[0].startswith(str(folder)) else f"{folder}: "
        raise UserError(place + faults[0])
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise UserError(f"{folder}: {len(faults)} errors\n{listed}")


def _mismatches(entries: Mapping[str, Entry], config: ModelConfig) -> list[str]:
    """List missing and extra tensors, and tensors with a wrong shape or dtype."""
    expected = {tensor.name: tensor for tensor in jax.tree.leaves(names.tensors(config))}
    faults = []
    if missing := set(expected) - set(entries):
        faults.append(f"missing tensors: {some(missing, 1000)}")
    extra = {name for name in set(entries) - set(expected) if not name.endswith("inv_freq")}
    if config.tied_embeddings and HEAD in extra:
        extra.remove(HEAD)  # some writers store a tied weight under both names
        expected[HEAD] = expected[EMBED]
    if extra:
        faults.append(f"unexpected tensors: {some(extra, 1000)}")
    for name in sorted(set(expected) & set(entries)):
        entry, shape = entries[name], expected[name].shape
        if entry.shape != shape:
            faults.append(f"{name}: shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in DTYPES:
            faults.append(f"{name}: dtype {entry.dtype}, expected one of {', '.join(DTYPES)}")
    return faults


def save(folder: str | pathlib.Path, params: Params, config: ModelConfig, *,
         shard_bytes: float = 5e9, extra_config: Mapping[str, Any] | None = None) -> None:
    """Write a folder that transformers and `load` can read.

    All files are written under temporary names and then renamed. config.json is renamed last, so an
    interrupted save to a new folder leaves no loadable model. Other files named
    `model*.safetensors*` in the folder, such as those of an earlier save, are removed.

    Args:
      folder: the folder to write; created if missing.
      params: the parameters, in the dtype to write.
      config: the model configuration.
      shard_bytes: the maximum total size in bytes of the tensors in a weight file. A larger tensor
        is written to its own file.
      extra_config: additional fields for config.json.

    Raises:
      UserError: the parameters contain int8 weights or do not match the configuration, or the
        folder is not writable.
    """
    folder = pathlib.Path(folder)
    arrays = names.named(params, config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, array) in arrays.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    written = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]

    def value(name: str) -> np.ndarray:
        return np.asarray(arrays[name][1])

    files: dict[str, Iterable[Any]] = {}
    for file, held in zip(written, shards, strict=True):
        tensors = {n: (np.dtype(arrays[n][1].dtype), arrays[n][0].shape) for n in held}
        files[file] = tensorfile.pieces(tensors, value, {"format": "pt"})
    if len(shards) > 1:
        where = {n: file for file, held in zip(written, shards, strict=True) for n in held}
        total = sum(array.nbytes for _, array in arrays.values())
        files[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": where})
    dtype = np.dtype(next(iter(arrays.values()))[1].dtype).name
    files["config.json"] = _json({**to_hf(config), "dtype": dtype, **(extra_config or {})})
    old = [path.name for path in folder.glob("model*.safetensors*")]
    tensorfile.replace_files(folder, files, [name for name in old if name not in files])


def _json(value: Mapping[str, Any]) -> list[bytes]:
    return [(json.dumps(value, indent=2) + "\n").encode()]
