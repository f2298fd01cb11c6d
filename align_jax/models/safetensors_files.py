"""A folder of safetensors, one or sharded, as a `layout.Source`; and written back."""

import json
import pathlib
from collections.abc import Iterable

import ml_dtypes  # noqa: F401  teaches NumPy the name bfloat16
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from align_jax.errors import InputError, one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Folder:
  """The tensors of model.safetensors, or of the shards its index lists."""

  format = "hf"

  def __init__(self, folder: pathlib.Path):
    self.path = str(folder)
    self._files = {name: _open(folder / name) for name in _shard_names(folder)}
    self._home = {key: file for file in self._files.values() for key in file.keys()}

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {n: tuple(f.get_slice(n).get_shape()) for n, f in self._home.items()}

  def dtype(self, name: str) -> str:
    """The NumPy name of a tensor's type."""
    kind = self._home[name].get_slice(name).get_dtype()
    if kind not in _DTYPES:
      raise InputError(f"{self.path}: tensor {name!r} is of type {kind}, not {', '.join(_DTYPES)}")
    return _DTYPES[kind]

  def read(self, name: str, rows: slice, columns: slice | None) -> np.ndarray:
    self.dtype(name)
    part = self._home[name].get_slice(name)
    return part[rows] if columns is None else part[rows, columns]


def write(folder: pathlib.Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int):
  """Writes `tensors` in shards of at most `shard_bytes` (or one tensor), and their index."""
  for old in (*folder.glob("model*.safetensors"), folder / INDEX):
    old.unlink(missing_ok=True)
  shard, size, shards = {}, 0, []

  def flush():
    shards.append((list(shard), size))
    temporary = folder / f"shard-{len(shards)}.safetensors"
    safetensors_numpy.save_file(shard, temporary, metadata={"format": "pt"})

  for name, tensor in tensors:
    if shard and size + tensor.nbytes > shard_bytes:
      flush()
      shard, size = {}, 0
    shard[name], size = tensor, size + tensor.nbytes
  flush()
  _name_shards(folder, shards)


def _name_shards(folder, shards):
  if len(shards) == 1:
    (folder / "shard-1.safetensors").rename(folder / SINGLE)
    return
  weight_map = {}
  for i, (names, _) in enumerate(shards, 1):
    file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
    (folder / f"shard-{i}.safetensors").rename(folder / file)
    weight_map.update(dict.fromkeys(names, file))
  index = {"metadata": {"total_size": sum(s for _, s in shards)}, "weight_map": weight_map}
  (folder / INDEX).write_text(json.dumps(index, indent=2))


def _shard_names(folder):
  if (folder / INDEX).exists():
    try:
      index = json.loads((folder / INDEX).read_text())
    except (ValueError, RecursionError) as error:
      raise InputError(f"{folder / INDEX} is no JSON: {one_line(error)}") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or not all(map(_is_shard, files.values())):
      what = "must be an object of tensors and the files beside it that hold them"
      raise InputError(f"{folder / INDEX}: field 'weight_map' {what}")
    return sorted(set(files.values()))
  if (folder / SINGLE).exists():
    return [SINGLE]
  raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}")


def _is_shard(name) -> bool:
  return isinstance(name, str) and name.endswith(".safetensors") and pathlib.Path(name).name == name


def _open(path):
  try:
    return safetensors.safe_open(path, framework="np")
  except FileNotFoundError as error:
    raise InputError(f"{path} is listed in the index but missing") from error
  except (safetensors.SafetensorError, OSError) as error:
    raise InputError(f"{path} is no readable safetensors file: {one_line(error)}") from error
