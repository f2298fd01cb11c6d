"""The transformer: one Flax Linen module, five collections, all layers in one scan.

  params  the weights; everything under "layers" is stacked over layers on axis 0; its matrices may
          be int8 with scales, where they are frozen (`lora.quantise_base`)
  lora    {"layers": {weight: {"a": [L, *in, r], "b": [L, r, *out]}}}: adapters; absent means none
  cache   {"layers": {"keys", "values": [L, B, K, S, H]}}: what decoding has seen; slot = position
  taps    {"layers": {site: [L, ...]}}: activations, sown when mutable=["taps"]
  edits   {"layers": {site: {"add", "project", "replace", "where"}}}: see `apply_edit`

Sites: resid_pre, resid_mid, resid_post, attention_out, mlp_out [B, T, D]; attention_heads
[B, T, heads, head_dim]; mlp_hidden [B, T, F]; attention_probs [B, K, G, T, S].
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from align_jax import sharding
from align_jax.models import attention, context_attention, deferred, embedding, quantised
from align_jax.models.config import ModelConfig

SITES = frozenset(
  {
    "resid_pre",
    "attention_heads",
    "attention_probs",
    "attention_out",
    "resid_mid",
    "mlp_hidden",
    "mlp_out",
    "resid_post",
  }
)
EDITS = frozenset({"add", "project", "replace", "where"})
WEIGHTS = ("query", "key", "value", "out", "gate", "up", "down")

_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  # What attention by tiles or by splash put out is kept as well: it is small, and dear to compute again.
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(attention.SAVED_NAME),
  ),
}


class Context(NamedTuple):
  """What all layers share; pairs are (global, local) and local is None where no layer differs."""

  positions: jax.Array  # [B or 1, T]
  tables: tuple  # rotary (cos, sin)
  masks: tuple | None  # None: `rows` say the same without a [T, T] array
  rows: attention.Rows | None


def weight_shapes(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
  """For every matrix of a layer its input and output shape."""
  d, f, h = config.embed_dim, config.mlp_dim, config.head_dim
  heads, kv_heads = (config.num_heads, h), (config.num_kv_heads, h)
  return {
    "query": ((d,), heads), "key": ((d,), kv_heads), "value": ((d,), kv_heads),
    "out": (heads, (d,)), "gate": ((d,), (f,)), "up": ((d,), (f,)), "down": ((f,), (d,)),
  }  # fmt: skip


WEIGHT_AXES = {
  "query": (("embed",), ("heads", "head_dim")), "key": (("embed",), ("kv_heads", "head_dim")),
  "value": (("embed",), ("kv_heads", "head_dim")), "out": (("heads", "head_dim"), ("embed",)),
  "gate": (("embed",), ("mlp",)), "up": (("embed",), ("mlp",)), "down": (("mlp",), ("embed",)),
}  # fmt: skip


def apply_edit(x: jax.Array, edit: Mapping[str, jax.Array]) -> jax.Array:
  """x where `where` is false, else `replace`; less its part along the `project` rows; plus `add`.

  x [..., D]; add, replace, where broadcast to x; project [K, D] holds orthonormal or zero rows.
  """
  if "replace" in edit:
    x = jnp.where(edit["where"], edit["replace"].astype(x.dtype), x)
  if "project" in edit:
    rows = edit["project"].astype(x.dtype)
    x = x - jnp.tensordot(jnp.tensordot(x, rows, (-1, -1)), rows, 1)
  if "add" in edit:
    x = x + edit["add"].astype(x.dtype)
  return x


class Block(nn.Module):
  """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

  config: ModelConfig
  lora_scale: float
  mesh: jax.sharding.Mesh | None  # what activations are split over, see `sharding.constrain`

  @nn.compact
  def __call__(self, x: jax.Array, layer, context: Context):
    c = self.config
    x = self._site("resid_pre", x)
    x, late = self._late(x, context)
    heads = self._attention(self._norm("attention_norm", x), layer, context)
    heads, late = deferred.beside(heads, late) if late else (heads, late)
    y = self._project("out", heads, late)
    if c.post_norms:
      y = self._norm("attention_post_norm", y)
    x = self._site("resid_mid", self._residual(x + self._site("attention_out", y)))
    y = self._mlp(self._norm("mlp_norm", x), late)
    if c.post_norms:
      y = self._norm("mlp_post_norm", y)
    return self._site("resid_post", self._residual(x + self._site("mlp_out", y))), None

  def _attention(self, x, layer, context):
    c = self.config
    index, local = layer
    q, k, v = (self._project(name, x) for name in ("query", "key", "value"))
    if c.qk_norm:
      q, k = self._norm("query_norm", q), self._norm("key_norm", k)
    table = _choose(local, context.tables)
    q, k = attention.rotate(q, table), attention.rotate(k, table)
    cached = self.has_variable("cache", "keys")
    if cached:
      k, v = self._remember(index, context.positions, keys=k, values=v)
    q = q.reshape(*q.shape[:2], c.num_kv_heads, -1, c.head_dim)
    if context.masks is None:
      heads = self._attend_rows(q, k, v, local, context.rows)
    else:
      heads = self._attend(q, k, v, _choose(local, context.masks), heads_first=cached)
    return self._site("attention_heads", heads.reshape(*x.shape[:2], c.num_heads, c.head_dim))

  def _late(self, x, context):
    """(x, {name: (matrix, slot)}) of what is behind attention and can wait for it, see `deferred`."""
    if context.masks is not None or self.is_initializing() or self.variables.get("lora"):
      return x, {}
    mesh = context_attention.ambient(self.mesh)
    if not context_attention.on_one_core(self.config.attention_impl, x.shape[1], mesh):
      return x, {}
    matrices = {name: self._matrix(name, x.dtype) for name in ("out", "gate", "up", "down")}
    return deferred.late(x.shape[0] * x.shape[1], x, matrices)

  def _attend(self, q, k, v, mask, *, heads_first):
    c = self.config
    probs = attention.attention_probs(
      q, k, mask, scale=c.query_scale, softcap=c.attention_softcap, heads_first=heads_first
    )
    return attention.attend(self._site("attention_probs", probs), v, heads_first=heads_first)

  def _attend_rows(self, q, k, v, local, rows):
    c, mesh = self.config, context_attention.ambient(self.mesh)
    impl = context_attention.choose(c.attention_impl, q.shape[1], mesh)

    def attend(window):
      return context_attention.attend(
        q,
        k,
        v,
        rows,
        window,
        impl=impl,
        mesh=mesh,
        scale=c.query_scale,
        softcap=c.attention_softcap,
      )

    if len(set(c.windowed)) > 1:
      return jax.lax.cond(local, lambda: attend(c.sliding_window), lambda: attend(None))
    return attend(c.sliding_window if c.windowed[0] else None)

  def _mlp(self, x, late):
    gate, up = self._project("gate", x, late), self._project("up", x, late)
    gate = jax.nn.silu(gate) if self.config.activation == "silu" else jax.nn.gelu(gate)
    hidden = sharding.constrain(gate * up, self.mesh, ("batch", "length", "mlp"))
    return self._project("down", self._site("mlp_hidden", hidden), late)

  def _residual(self, x: jax.Array) -> jax.Array:
    return sharding.constrain(x, self.mesh, ("batch", "length", "embed"))

  def _project(self, name: str, x: jax.Array, late: Mapping | None = None) -> jax.Array:
    """x W + scale (x A) B (+ bias); the last axes of x are W's input."""
    c, dtype = self.config, x.dtype
    (_, outputs), (_, out_axes) = weight_shapes(c)[name], WEIGHT_AXES[name]
    matrix, slot = (late or {}).get(name) or (self._matrix(name, dtype), None)
    y = linear(x, matrix, outputs, slot)
    if self.has_variable("lora", name):
      adapter = self.get_variable("lora", name)
      low = linear(x, adapter["a"].astype(dtype), adapter["a"].shape[-1:])
      y = y + self.lora_scale * linear(low, adapter["b"].astype(dtype), outputs)
    if c.qkv_bias and name in ("query", "key", "value"):
      init = nn.with_logical_partitioning(nn.initializers.zeros, out_axes)
      bias = self.param(f"{name}_bias", init, outputs, jnp.dtype(c.param_dtype))
      y = y + sharding.on_device(bias).astype(dtype)
    return y

  def _matrix(self, name: str, dtype) -> jax.Array:
    """W as [inputs, outputs], in the type and at the place of the computation."""
    c = self.config
    (inputs, outputs), (in_axes, out_axes) = weight_shapes(c)[name], WEIGHT_AXES[name]
    std = np.prod(inputs) ** -0.5 * ((2 * c.num_layers) ** -0.5 if name in ("out", "down") else 1)
    init = nn.with_logical_partitioning(nn.initializers.normal(std), in_axes + out_axes)
    weight = self.param(name, init, inputs + outputs, jnp.dtype(c.param_dtype))
    weight = jax.tree.map(sharding.on_device, weight)
    if not quantised.is_quantised(weight):
      weight = weight.astype(dtype)
    if not self.has_variable("cache", "keys"):
      # Gathered over fsdp layer by layer, in the type of the computation or as int8. Not while
      # decoding: there the activations are smaller than the weights.
      axes = in_axes + out_axes
      weight = jax.tree.map(lambda w: sharding.gathered(w, self.mesh, axes), weight)
    return quantised.dequantise(weight, dtype).reshape(math.prod(inputs), math.prod(outputs))

  def _norm(self, name: str, x: jax.Array) -> jax.Array:
    axis = "head_dim" if name in ("query_norm", "key_norm") else "embed"
    init = _norm_init(self.config, axis)
    scale = self.param(name, init, x.shape[-1:], jnp.dtype(self.config.param_dtype))
    return rms_norm(x, sharding.on_device(scale), self.config)

  def _remember(self, index, positions, **new):
    """Writes this layer's new keys and values to their slots; returns the layer's whole cache."""
    rows = jnp.arange(new["keys"].shape[0])[:, None]
    for name, value in new.items():
      cache = self.get_variable("cache", name)
      # A position past the last slot is dropped, never clamped onto it. One write a token, of all
      # its heads: on CPU every write of a scatter costs the same few microseconds.
      cache = cache.at[index, rows, :, positions].set(value.astype(cache.dtype), mode="drop")
      self.put_variable("cache", name, cache)
      yield cache[index].astype(value.dtype)

  def _site(self, name: str, x: jax.Array) -> jax.Array:
    if self.has_variable("edits", name):
      x = apply_edit(x, self.get_variable("edits", name))
    self.sow("taps", name, x, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return x


class Transformer(nn.Module):
  """A decoder-only language model over the collections named at the top of this file."""

  config: ModelConfig
  lora_scale: float = 1.0
  mesh: jax.sharding.Mesh | None = (
    None  # where activations are held to their places; None: one device
  )

  def setup(self):
    c = self.config
    dtype = jnp.dtype(c.param_dtype)
    # A table that is not the head as well starts at unit scale: at 0.02 the blocks' first outputs drown
    # the tokens, and small models learn facts several times slower.
    std = c.embed_dim**-0.5 if c.scale_embeddings else 0.02 if c.tie_embeddings else 1.0
    table = nn.with_logical_partitioning(nn.initializers.normal(std), embedding.TABLE_AXES)
    self.embedding = self.param("embedding", table, (c.vocab_size, c.embed_dim), dtype)
    self.final_norm = self.param("final_norm", _norm_init(c, "embed"), (c.embed_dim,), dtype)
    if not c.tie_embeddings:
      init = nn.initializers.normal(c.embed_dim**-0.5)
      init = nn.with_logical_partitioning(init, embedding.HEAD_AXES)
      self.unembedding = self.param("unembedding", init, (c.embed_dim, c.vocab_size), dtype)
    block = Block
    if c.remat != "none":
      block = nn.remat(Block, policy=_REMAT_POLICIES[c.remat], prevent_cse=False)
    self.layers = nn.scan(
      block,
      variable_axes={"params": 0, "lora": 0, "taps": 0, "edits": 0},
      variable_carry="cache",
      split_rngs={"params": True},
      in_axes=(0, nn.broadcast),
      length=c.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(c, self.lora_scale, self.mesh)

  def __call__(self, tokens, positions=None, segment_ids=None, branch_ids=None) -> jax.Array:
    """Logits [B, T, V] float32 of tokens [B, T] int32.

    positions [B, T] default to 0, 1, 2...; tokens see their own segment only (segment_ids [B, T],
    0 = padding), and of it only the trunk and their own branch (branch_ids [B, T], 0 = trunk), so
    that several continuations share one prompt.  With a cache, tokens are written at the slots
    `positions` and see all slots up to their own; rows may be of different ages.
    """
    return self.unembed(self.hidden(tokens, positions, segment_ids, branch_ids))

  def hidden(self, tokens, positions=None, segment_ids=None, branch_ids=None) -> jax.Array:
    """The residual stream behind the last norm, [B, T, D]; arguments as for `__call__`."""
    c = self.config
    self._check_names()
    x = embedding.look_up(sharding.on_device(self.embedding), tokens, self.mesh).astype(
      jnp.dtype(c.dtype)
    )
    if c.scale_embeddings:
      x = x * jnp.asarray(c.embed_dim**0.5, x.dtype)
    x = sharding.constrain(x, self.mesh, ("batch", "length", "embed"))
    context = self._context(tokens, positions, segment_ids, branch_ids)
    layers = (jnp.arange(c.num_layers), jnp.asarray(c.windowed))
    x, _ = self.layers(x, layers, context)
    return rms_norm(x, sharding.on_device(self.final_norm), c)

  def unembed(self, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] float32, soft-capped, of `hidden` [..., D], split by classes on a mesh."""
    c = self.config
    table = sharding.on_device(self.embedding if c.tie_embeddings else self.unembedding)
    table = table.T if c.tie_embeddings else table
    rows, classes = self._logit_axes(hidden)
    hidden = sharding.constrain(hidden, self.mesh, (*rows, None))
    flat, table = hidden.reshape(-1, c.embed_dim), table.astype(hidden.dtype)
    logits = jnp.dot(flat, table, preferred_element_type=jnp.float32)
    logits = logits.reshape(*hidden.shape[:-1], c.vocab_size)
    logits = sharding.constrain(logits, self.mesh, (*rows, classes))
    if c.logit_softcap is not None:
      logits = c.logit_softcap * jnp.tanh(logits / c.logit_softcap)
    return logits

  def _logit_axes(self, hidden):
    """Where logits live: classes apart and the rows of a replica together, where classes divide."""
    others = (None,) * (hidden.ndim - 2)
    if self.mesh is None:
      return ("batch", *others), None
    shape, axes = (self.config.vocab_size,), ("classes",)
    if sharding.activation_spec(axes, shape, self.mesh)[0] is not None:
      return ("replicas", *others), "classes"
    return ("batch", *others), "vocab"

  def _context(self, tokens, positions, segment_ids, branch_ids) -> Context:
    c = self.config
    length = tokens.shape[1]
    slots = self._cache_slots()
    if slots is not None and (segment_ids is not None or branch_ids is not None):
      raise ValueError("segment_ids and branch_ids do not go with a cache: its slots are positions")
    if branch_ids is not None and positions is None:
      raise ValueError("branch_ids need positions: every branch goes on where its trunk ends")
    if positions is None:
      positions = jnp.arange(length)[None]
    if slots is not None:
      positions = jnp.broadcast_to(positions, tokens.shape)
    whole = slots is None and self._sees_rows(length)

    def mask(window):
      if slots is not None:
        return attention.cache_mask(positions, slots, window)
      return attention.sequence_mask(
        length, segment_ids, window, positions=positions, branch_ids=branch_ids
      )

    def table(theta, scaling):
      freqs = attention.rope_frequencies(c.head_dim, theta, scaling)
      return attention.rope_table(positions, freqs)

    if c.rope_local_theta is None:
      tables = table(c.rope_theta, c.rope_scaling), None
    else:
      tables = _pair(c, table, (c.rope_theta, c.rope_scaling), (c.rope_local_theta, None))
    if whole:
      places = jnp.arange(length)[None]
      rows = attention.Rows(places, positions, segment_ids, branch_ids)
      return Context(positions, tables, None, rows)
    return Context(positions, tables, _pair(c, mask, (None,), (c.sliding_window,)), None)

  def _sees_rows(self, length: int) -> bool:
    """Whether attention needs no [T, T] array; the site attention_probs is one, so xla serves it."""
    edited = "attention_probs" in self.variables.get("edits", {}).get("layers", {})
    if edited or self.is_mutable_collection("taps"):
      return False
    mesh = context_attention.ambient(self.mesh)
    return context_attention.choose(self.config.attention_impl, length, mesh) != "xla"

  def _cache_slots(self) -> int | None:
    cache = self.variables.get("cache", {})
    return cache["layers"]["keys"].shape[3] if cache else None

  def _check_names(self):
    known = {"lora": frozenset(WEIGHTS), "edits": SITES}
    for collection, names in known.items():
      for name, value in self.variables.get(collection, {}).get("layers", {}).items():
        wrong = set() if collection == "lora" else set(value) - EDITS
        if name not in names or wrong:
          raise ValueError(
            f"{collection} knows {sorted(names)} {sorted(EDITS)}, not {name} {wrong}"
          )


def linear(x: jax.Array, weight: jax.Array, outputs: tuple[int, ...], slot=None) -> jax.Array:
  """x [B, T, *inputs] times weight [*inputs, *outputs], [B, T, *outputs]; slot: see `deferred`."""
  # One flat matrix product: on CPU its gradients take half the time of those of the batched form.
  rows, weight = x.reshape(x.shape[0] * x.shape[1], -1), weight.reshape(-1, math.prod(outputs))
  y = rows @ weight if slot is None else deferred.product(rows, weight, slot)
  return y.reshape(*x.shape[:2], *outputs)


def rms_norm(x: jax.Array, scale: jax.Array, config: ModelConfig) -> jax.Array:
  """x / rms(x) * scale over the last axis, in float32; scale [D], or 1 + scale for Gemma."""
  wide = x.astype(jnp.float32)
  wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.norm_eps)
  scale = scale.astype(jnp.float32) + (1.0 if config.norm_plus_one else 0.0)
  return (wide * scale).astype(x.dtype)


def _norm_init(config, axis):
  init = nn.initializers.zeros if config.norm_plus_one else nn.initializers.ones
  return nn.with_logical_partitioning(init, (axis,))


def _pair(config, make, of_global, of_local):
  """(global, local) values; only one is made where all layers are of one kind."""
  if not any(config.windowed):
    return make(*of_global), None
  if all(config.windowed):
    return make(*of_local), None
  return make(*of_global), make(*of_local)


def _choose(local, pair):
  of_global, of_local = pair
  if of_local is None:
    return of_global
  return jax.tree.map(lambda g, l: jnp.where(local, l, g), of_global, of_local)
