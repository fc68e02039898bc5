"""Load and save Hugging Face folders: config.json and safetensors weights.

Tensors are read one by one, each shard directly onto the devices that hold it, without PyTorch and
without a second copy in memory. All errors in the files are collected and raised together before
any weights are read.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import json
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxpersona.ckpts import tensorfile
from jaxpersona.ckpts.shards import INDEX, SINGLE, read_entries, some
from jaxpersona.ckpts.tensorfile import DTYPES, Entry, parse_dtype

from jaxpersona.distributed import sharding
from jaxpersona.errors import UserError
from jaxpersona.inputs import read_json, require_file, require_folder
from jaxpersona.models.config import ModelConfig, replace
from jaxpersona.models.families import from_hf, to_hf
from jaxpersona.models.params import Params, Spec, layout

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER = "adapter_config.json"
READERS = 3  # tensors read concurrently: allocating fresh memory can stall one thread
Progress = Callable[[int, int], None]


def read_config(folder: str | pathlib.Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a folder's config.json.

    If `tie_word_embeddings` is true but the weights hold an output head that differs from the
    embedding, the returned configuration is untied, as in transformers, and a warning is issued.

    Returns:
      The configuration and the raw dict of the file.

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
        raise UserError(f"{folder / 'config.json'}: holds {type(raw).__name__}, not a JSON object")
    try:
        config = from_hf(raw, place=str(folder / "config.json"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    if config.tied_embeddings and _has_other_head(read_entries(folder)[0]):
        warnings.warn(f"{folder}: tie_word_embeddings is true, but {HEAD} differs from {EMBED}; "
                      "both are used, as in transformers. Set it to false in config.json, or "
                      f"remove {HEAD}", UserWarning, stacklevel=3)
        config = replace(config, tied_embeddings=False)
    return config, raw


def _has_other_head(entries: Mapping[str, Entry]) -> bool:
    """Return whether the files hold an embedding and a head of equal shape and other values."""
    embed, head = entries.get(EMBED), entries.get(HEAD)
    if embed is None or head is None or embed.shape != head.shape:
        return False  # `load` reports a head of another shape
    if not {embed.dtype, head.dtype} <= set(DTYPES):
        return False
    pairs = zip(tensorfile.read_pieces(embed), tensorfile.read_pieces(head), strict=True)
    return any(not np.array_equal(a.astype(np.float32), b.astype(np.float32), equal_nan=True)
               for a, b in pairs)


def _without_config(folder: pathlib.Path) -> str:
    """Describe a folder without config.json and how to turn it into a model folder."""
    path = folder / ADAPTER
    if path.exists():
        raw = read_json(path)
        raw = raw if isinstance(raw, dict) else {}
        base, kind = raw.get("base_model_name_or_path"), raw.get("peft_type")
        what = "a LoRA adapter" if kind in (None, "LORA") else f"a PEFT adapter ({kind!r:.40})"
        of = f" of {base!r:.200}" if isinstance(base, str) and base else ""
        return (f"{what}{of}, not a model ({ADAPTER} without config.json); merge it into its base "
                "with peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
                ".save_pretrained(NEW), save the tokenizer there too, and load NEW")
    if (folder / "params.json").exists():
        return ("not in the Hugging Face layout (params.json without config.json: the original "
                "release layout); convert it with transformers, or load it from the hub")
    return "not a model folder (no config.json)"


def load(folder: str | pathlib.Path, config: ModelConfig | None = None, *,
         dtype: DTypeLike | None = None,
         mesh: Mesh | None = None, progress: Progress | None = None) -> Params:
    """Load the parameters of a folder.

    Args:
      folder: holds `model.safetensors`, or shards and their index.
      config: the model configuration; read from the folder if None.
      dtype: float32, bfloat16 or float16; None keeps each tensor's dtype.
      mesh: shards the parameters by `sharding.RULES`; each process reads only its own shards.
      progress: called with (bytes read so far, total bytes).

    Raises:
      UserError: the files are invalid; one message lists every error.
    """
    folder = pathlib.Path(folder)
    if config is None:
        config, _ = read_config(folder)
    target = None if dtype is None else parse_dtype(dtype)
    specs, tree = jax.tree.flatten(layout(config))
    entries, faults = _tensors(folder, config)
    _refuse(folder, faults)
    total = sum(entries[spec.file_name].size for spec in specs)
    done, arrays = 0, []

    def read(spec: Spec) -> np.ndarray:
        entry = entries[spec.file_name]
        return tensorfile.read_as(entry, target or DTYPES[entry.dtype]).reshape(spec.shape)

    if mesh is None:
        placed = map(jax.device_put, _ahead(read, specs))
    else:
        fitted = sharding.fit(mesh, config)
        placed = _ahead(lambda s: _place(entries[s.file_name], s, target, fitted), specs)
    for spec, array in zip(specs, placed, strict=True):
        arrays.append(array)
        done += entries[spec.file_name].size
        if progress is not None:
            progress(done, total)
    return jax.tree.unflatten(tree, arrays)


def verify(folder: str | pathlib.Path, sha256: Mapping[str, str] | None = None) -> dict[str, int]:
    """Check a folder without loading it: file sizes, headers, index, tensor shapes and hashes.

    Args:
      folder: the folder.
      sha256: expected hexadecimal digests by file name.

    Returns:
      The size in bytes of every weight file, by name.

    Raises:
      UserError: the folder is invalid; one message lists every error.
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
    """Return the folder's tensors and every mismatch with the configuration."""
    entries, faults = read_entries(folder)
    if config.tied_embeddings and EMBED not in entries and HEAD in entries:
        entries[EMBED] = entries[HEAD]  # some writers store a shared tensor under one name only
    if entries or not faults:  # an unreadable folder already has a fault
        faults += _mismatches(entries, jax.tree.leaves(layout(config)), config)
    if not faults and config.tied_embeddings and _has_other_head(entries):
        faults.append(f"{HEAD}: differs from {EMBED}, but config has tied_embeddings=True; "
                      "use the configuration that read_config returns")
    return entries, faults


def _refuse(folder: pathlib.Path, faults: list[str]) -> None:
    if faults:
        listed = "\n".join(f"  - {fault}" for fault in faults)
        raise UserError(f"{folder}: {_count(len(faults), 'fault')}\n{listed}")


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _mismatches(entries: Mapping[str, Entry], specs: list[Spec], config: ModelConfig) -> list[str]:
    """List missing, extra, mis-shaped and mistyped tensors."""
    expected = {spec.file_name: spec for spec in specs}
    faults = []
    if missing := set(expected) - set(entries):
        faults.append(f"missing: {some(missing, 1000)}")
    extra = {name for name in set(entries) - set(expected) if not name.endswith("inv_freq")}
    if config.tied_embeddings and HEAD in extra:
        extra.remove(HEAD)  # some writers store the tied head a second time
        expected[HEAD] = expected[EMBED]
    if extra:
        faults.append(f"extra: {some(extra, 1000)}")
    for name in sorted(set(expected) & set(entries)):
        entry, shape = entries[name], expected[name].file_shape
        if entry.shape != shape:
            faults.append(f"{name}: shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in DTYPES:
            faults.append(f"{name}: dtype {entry.dtype}; supported are {', '.join(DTYPES)}")
    return faults


def _ahead(read: Callable[[Spec], Any], specs: Iterable[Spec]) -> Iterator[Any]:
    """Yield `read(spec)` in order, prefetching at most `READERS` results in threads."""
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        for spec in specs:
            waiting.append(pool.submit(read, spec))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _place(entry: Entry, spec: Spec, target: np.dtype | None, mesh: Mesh) -> jax.Array:
    """Read this process's shards of one tensor; each is read once and copied to its devices."""
    dtype = target or DTYPES[entry.dtype]
    placed = sharding.weight_sharding(spec.axes, spec.shape, mesh)
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in placed.addressable_devices_indices_map(spec.shape).items():
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index or (), spec.shape, strict=True))
        holders.setdefault(ranges, []).append(device)
    shards = []
    for ranges, devices in holders.items():
        part = tensorfile.read_slice(entry, file_index(spec, list(ranges)))
        part = _cast(part, dtype).reshape([stop - start for start, stop in ranges])
        shards += [jax.device_put(part, device) for device in devices]
    return jax.make_array_from_single_device_arrays(spec.shape, placed, shards)


def file_index(spec: Spec, ranges: list[tuple[int, int]]) -> tuple[slice, ...]:
    """Map index ranges of a parameter to slices of its tensor in the file.

    A file dimension is one parameter dimension, or several flattened (heads × head_dim). Of
    flattened dimensions only the first may be sharded: devices hold whole heads.
    """
    out, at = [], 0
    for extent in spec.file_shape:
        first, inner = at, 1
        at += 1
        while spec.shape[first] * inner < extent:
            if ranges[at] != (0, spec.shape[at]):
                raise UserError(f"{spec.file_name}: one head cannot be sharded over devices")
            inner *= spec.shape[at]
            at += 1
        out.append(slice(ranges[first][0] * inner, ranges[first][1] * inner))
    return tuple(out)


def _cast(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if values.dtype == dtype:
        return values
    out = tensorfile.aligned(values.shape, dtype)
    np.copyto(out, values, casting="unsafe")
    return out


def save(folder: str | pathlib.Path, params: Params, config: ModelConfig, *,
         shard_bytes: float = 5e9, extra_config: Mapping[str, Any] | None = None) -> None:
    """Write a folder that transformers and `load` can read.

    Files are written under temporary names and renamed once all are complete, config.json last, so
    an interrupted save leaves no loadable model.

    Args:
      folder: created if missing.
      params: the parameters, in the dtype to write.
      config: the model configuration.
      shard_bytes: maximum size of a weight file in bytes.
      extra_config: additional entries of config.json.

    Raises:
      UserError: the parameters do not match the configuration, or the folder is not writable.
    """
    folder = pathlib.Path(folder)
    arrays = named(params, config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, (_, array) in arrays.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
    ]

    def value(name: str) -> np.ndarray:
        return np.asarray(arrays[name][1])

    files: dict[str, Iterable[Any]] = {}
    for file, held in zip(names, shards, strict=True):
        tensors = {n: (np.dtype(arrays[n][1].dtype), arrays[n][0].file_shape) for n in held}
        files[file] = tensorfile.pieces(tensors, value, {"format": "pt"})
    if len(shards) > 1:
        where = {n: file for file, held in zip(names, shards, strict=True) for n in held}
        total = sum(array.nbytes for _, array in arrays.values())
        files[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": where})
    dtype = np.dtype(next(iter(arrays.values()))[1].dtype).name
    files["config.json"] = _json({**to_hf(config), "dtype": dtype, **(extra_config or {})})
    old = [path.name for path in folder.glob("model*.safetensors*")]
    tensorfile.replace_files(folder, files, [name for name in old if name not in files])


def named(params: Params, config: ModelConfig) -> dict[str, tuple[Spec, jax.Array]]:
    """Return {tensor name: (spec, array)} for every parameter.

    Raises:
      UserError: the structure, a shape or a dtype does not match the configuration.
    """
    specs, tree = jax.tree.flatten(layout(config))
    arrays, structure = jax.tree.flatten(params)
    if structure != tree:
        raise UserError("the tree structure of params does not match the configuration")
    faults = [
        f"{spec.file_name}: {array.dtype}{list(array.shape)}, expected {list(spec.shape)} in "
        "float32, bfloat16 or float16"
        for spec, array in zip(specs, arrays, strict=True)
        if array.shape != spec.shape or np.dtype(array.dtype) not in DTYPES.values()
    ]
    if faults:
        raise UserError("params do not match the configuration: " + "; ".join(faults))
    return {s.file_name: (s, a) for s, a in zip(specs, arrays, strict=True)}


def _json(value: Mapping[str, Any]) -> list[bytes]:
    return [(json.dumps(value, indent=2) + "\n").encode()]
