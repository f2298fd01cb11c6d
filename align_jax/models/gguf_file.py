"""A GGUF file: its ModelConfig, and its tensors, dequantised, as a `layout.Source`."""

import pathlib

import gguf
import numpy as np

from align_jax.errors import InputError, one_line
from align_jax.models import gguf_reader
from align_jax.models.config import MOST_LAYERS, ModelConfig, RopeScaling
from align_jax.models.families import FAMILIES

_FAMILY = {family.gguf: kind for kind, family in reversed(FAMILIES.items())}
_PERIOD = {"gemma2": 2, "gemma3": 6}
# The two Gemmas whose attention scale is not head_dim ** -0.5, which GGUF does not record.
_UNSAID_SCALE = {("gemma2", 46), ("gemma3", 62)}
_PIECE = 4096  # rows


class GgufFile:
  """Reads llama.cpp's format; q and k of `llama` files come back in Hugging Face's row order."""

  format = "gguf"

  def __init__(self, path: pathlib.Path):
    self.path = str(path)
    self._fields, self._tensors = gguf_reader.read(path)
    self.architecture = self.field("general.architecture")
    if not isinstance(self.architecture, str) or self.architecture not in _FAMILY:
      known = ", ".join(_FAMILY)
      raise InputError(f"{path}: architecture {self.architecture!r} is not supported; {known} are")

  def field(self, name: str, default=None):
    """A metadata value, or `default`; raises InputError where both are missing."""
    if name in self._fields:
      return self._fields[name]
    if default is None:
      raise InputError(f"{self.path}: the field {name!r} is missing")
    return default

  def has(self, name: str) -> bool:
    return name in self._fields

  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in self._tensors.items()}

  def read(self, name: str, rows: slice, columns: slice | None) -> np.ndarray:
    """float32; vectors are one row to GGUF."""
    tensor = self._tensors[name]
    if columns is None:
      values = self._values(tensor.data, tensor.type, name)[rows]
      plus_one = FAMILIES[_FAMILY[self.architecture]].features["norm_plus_one"]
      return values - 1.0 if plus_one else values
    if self.architecture == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
      values = self._values(tensor.data, tensor.type, name)
      return self._unpermute(values, name)[rows, columns]
    return self._dequantise(tensor, rows, columns, name)

  def config(self) -> ModelConfig:
    """The model the metadata describes; raises InputError where they describe none."""
    try:
      return self._config()
    except InputError:
      raise
    except (ValueError, TypeError, ArithmeticError) as error:
      raise InputError(f"{self.path}: its metadata describe no model: {one_line(error)}") from error

  def _config(self) -> ModelConfig:
    arch = self.architecture
    family = FAMILIES[_FAMILY[arch]]
    shapes = self.shapes()
    if "token_embd.weight" not in shapes:
      raise InputError(f"{self.path}: tensor 'token_embd.weight' is missing")

    def get(name, default=None):
      return self.field(f"{arch}.{name}", default)

    heads, dim, layers = get("attention.head_count"), get("embedding_length"), get("block_count")
    if layers > MOST_LAYERS:
      raise InputError(f"{self.path}: field '{arch}.block_count' is {layers}: no model is so deep")
    if (arch, layers) in _UNSAID_SCALE:
      raise InputError(f"{self.path}: the 27B {arch} is read from its Hugging Face folder only")
    window = get("attention.sliding_window", 0) or None
    if arch not in _PERIOD:
      window = None
    local = [window is not None and (i + 1) % _PERIOD[arch] != 0 for i in range(layers)]
    return ModelConfig(
      family=_FAMILY[arch],
      vocab_size=shapes["token_embd.weight"][0],
      embed_dim=dim,
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=get("attention.head_count_kv", heads),
      head_dim=get("attention.key_length", dim // heads),
      mlp_dim=get("feed_forward_length"),
      max_length=get("context_length"),
      tie_embeddings="output.weight" not in shapes,
      norm_eps=round(get("attention.layer_norm_rms_epsilon"), 12),
      attention_softcap=get("attn_logit_softcapping", 50.0) if arch == "gemma2" else None,
      logit_softcap=get("final_logit_softcapping", 30.0) if arch == "gemma2" else None,
      rope_theta=get("rope.freq_base", family.rope_theta),
      rope_local_theta=10_000.0 if arch == "gemma3" else None,
      rope_scaling=self._rope_scaling(),
      sliding_window=window,
      local_layers=tuple(local) if window else (),
      **family.features,
    )

  def _values(self, data, kind, name):
    try:
      return gguf.quants.dequantize(data, kind)
    except (NotImplementedError, ValueError) as error:
      raise InputError(
        f"{self.path}: tensor {name!r} of type {kind.name} cannot be read: {one_line(error)}"
      ) from error

  def _dequantise(self, tensor, rows, columns, name):
    # In pieces, because dequantising takes several times the memory of its result.
    out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    for start in range(rows.start, rows.stop, _PIECE):
      piece = slice(start, min(start + _PIECE, rows.stop))
      values = self._values(tensor.data[piece], tensor.type, name)
      out[piece.start - rows.start : piece.stop - rows.start] = values[:, columns]
    return out

  def _rope_scaling(self):
    kind = self.field(f"{self.architecture}.rope.scaling.type", "none")
    if kind == "none":
      return None
    if kind != "linear":
      raise InputError(f"{self.path}: rope scaling {kind!r} is not supported in GGUF; linear is")
    return RopeScaling("linear", self.field(f"{self.architecture}.rope.scaling.factor"))

  def _unpermute(self, values, name):
    """llama.cpp rotates neighbouring rows, Hugging Face the halves of a head: restores halves."""
    query_heads = self.field("llama.attention.head_count")
    heads = query_heads
    if name.endswith("attn_k.weight"):
      heads = self.field("llama.attention.head_count_kv", query_heads)
    pairs = values.reshape(heads, -1, 2, values.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values.shape)
