"""config.json to ModelConfig and back."""

from align_jax.errors import InputError, one_line
from align_jax.models.config import MOST_LAYERS, ModelConfig, RopeScaling
from align_jax.models.families import FAMILIES, Family

_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}
_KINDS = {  # field of config.json -> its type; a float may be written as an integer
  int: (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
    "max_window_layers", "sliding_window_pattern", "original_max_position_embeddings",
  ),
  float: (
    "rms_norm_eps", "rope_theta", "rope_local_base_freq", "query_pre_attn_scalar", "factor",
    "attn_logit_softcapping", "final_logit_softcapping", "partial_rotary_factor",
    "low_freq_factor", "high_freq_factor",
  ),
  bool: ("tie_word_embeddings", "use_sliding_window"),
  str: ("hidden_act", "hidden_activation", "rope_type", "type"),
  list: ("layer_types",),
  dict: ("rope_parameters", "rope_scaling", "sliding_attention", "full_attention"),
}  # fmt: skip
_MAY_BE_NULL = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
_REFUSED = ("attention_bias", "mlp_bias", "use_bidirectional_attention", "quantization_config")


def from_hf(hf: dict, source: str) -> ModelConfig:
  """The ModelConfig of a parsed config.json; raises InputError naming what is not supported."""
  kind = hf.get("model_type")
  if not isinstance(kind, str) or kind not in FAMILIES:
    known = ", ".join(FAMILIES)
    raise InputError(f"{source}: model_type {one_line(repr(kind))} is not supported; {known} are")
  hf = _typed(hf, source)
  family = FAMILIES[kind]
  _refuse(hf, source, family)

  def need(name):
    if not isinstance(hf.get(name), int):
      raise InputError(f"{source}: field {name!r} must be an integer, not {hf.get(name)!r}")
    return hf[name]

  heads, layers = need("num_attention_heads"), need("num_hidden_layers")
  if heads < 1 or not 1 <= layers <= MOST_LAYERS:
    raise InputError(f"{source}: {layers} layers of {heads} heads are no model")
  window, local = _windows(hf, source, kind, family, layers)
  head_dim = hf.get("head_dim") or need("hidden_size") // heads
  scalar = hf.get("query_pre_attn_scalar", 256) if family.features["norm_plus_one"] else None
  softcaps = _softcaps(hf, family)
  try:
    return ModelConfig(
      family=kind,
      vocab_size=need("vocab_size"),
      embed_dim=need("hidden_size"),
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=hf.get("num_key_value_heads") or heads,
      head_dim=head_dim,
      mlp_dim=need("intermediate_size"),
      max_length=hf.get("max_position_embeddings", 2048),
      tie_embeddings=hf.get("tie_word_embeddings", family.tied),
      norm_eps=hf.get("rms_norm_eps", 1e-6),
      attention_scale=None if scalar is None else scalar**-0.5,
      attention_softcap=softcaps[0],
      logit_softcap=softcaps[1],
      sliding_window=window,
      local_layers=local,
      **_rope(hf, source, kind, family),
      **family.features,
    )
  except InputError:
    raise
  except ValueError as error:
    raise InputError(f"{source}: {error}") from error


def _typed(hf: dict, source: str) -> dict:
  """Without fields that are null for "not said"; raises InputError where one is of a wrong type."""
  hf = {k: v for k, v in hf.items() if v is not None or k in _MAY_BE_NULL}
  for kind, names in _KINDS.items():
    for name in names:
      value = hf.get(name)
      if value is None:
        continue
      number = kind in (int, float) and not isinstance(value, bool)
      if not (isinstance(value, kind) or (kind is float and isinstance(value, int))) or (
        isinstance(value, bool) and number is False and kind is not bool
      ):
        what = {int: "an integer", dict: "an object"}.get(kind, f"a {kind.__name__}")
        raise InputError(
          f"{source}: field {name!r} must be {what}, not {one_line(repr(value), 60)}"
        )
      if kind in (int, float) and not -(2**31) < value < 2**31:
        raise InputError(f"{source}: field {name!r} is out of range")
      if kind is dict:
        hf[name] = _typed(value, f"{source}: {name}")
  return hf


def to_hf(config: ModelConfig) -> dict:
  """What to write as config.json; raises InputError where the family has no word for `config`."""
  family = FAMILIES.get(config.family)
  if family is None:
    raise InputError(f"family {config.family!r} cannot be saved; {', '.join(FAMILIES)} can")
  hf = {
    "architectures": [family.architecture],
    "model_type": config.family,
    "vocab_size": config.vocab_size,
    "hidden_size": config.embed_dim,
    "intermediate_size": config.mlp_dim,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "max_position_embeddings": config.max_length,
    "rms_norm_eps": config.norm_eps,
    "tie_word_embeddings": config.tie_embeddings,
    "rope_theta": config.rope_theta,
    "rope_scaling": _rope_scaling_to_hf(config.rope_scaling),
    "attention_dropout": 0.0,
  }
  gemma = family.features["norm_plus_one"]
  hf["hidden_activation" if gemma else "hidden_act"] = "gelu_pytorch_tanh" if gemma else "silu"
  if gemma:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    hf["query_pre_attn_scalar"] = round(scale**-2)
    hf["attn_logit_softcapping"] = config.attention_softcap
    hf["final_logit_softcapping"] = config.logit_softcap
  if config.family != "llama":
    hf["sliding_window"] = config.sliding_window
  if config.family not in ("llama", "mistral"):
    types = list(_LAYER_TYPES)
    hf["layer_types"] = [types[local] for local in config.windowed]
  if config.family.startswith("qwen"):
    hf["use_sliding_window"] = config.sliding_window is not None
    hf["max_window_layers"] = (*config.windowed, True).index(True)
  if config.family == "gemma3_text":
    hf["rope_local_base_freq"] = config.rope_local_theta
  _check_faithful(config, hf)
  return hf


def _check_faithful(config, hf):
  """Reads `hf` back: whatever does not return as it was, the family has no word for."""
  back = from_hf(hf, "config.json")
  for name in vars(config):
    if name in ("dtype", "param_dtype", "remat", "attention_impl"):
      continue
    ours, theirs = vars(config)[name], vars(back)[name]
    if name == "local_layers":
      ours, theirs = config.windowed, back.windowed
    if name == "attention_scale":
      ours, theirs = (c.attention_scale or c.head_dim**-0.5 for c in (config, back))
      theirs = ours if abs(ours - theirs) < 1e-6 * ours else theirs
    if ours != theirs:
      raise InputError(f"a {config.family} checkpoint cannot say {name}={vars(config)[name]!r}")


def _refuse(hf, source, family):
  for name in _REFUSED:
    if hf.get(name):
      raise InputError(f"{source}: {name}={hf[name]!r} is not supported")
  if hf.get("partial_rotary_factor", 1.0) != 1.0:
    raise InputError(f"{source}: partial_rotary_factor is not supported")
  want = ("gelu_pytorch_tanh",) if family.features["norm_plus_one"] else ("silu", "swish")
  # Gemma's old configs carry a wrong `hidden_act` beside the right `hidden_activation`.
  act = hf.get("hidden_activation") or hf.get("hidden_act") or want[0]
  if act not in want:
    raise InputError(f"{source}: the activation {act!r} is not supported for {hf['model_type']}")


def _softcaps(hf, family):
  if not family.features["norm_plus_one"]:
    return None, None
  attention, logits = family.softcaps
  return hf.get("attn_logit_softcapping", attention), hf.get("final_logit_softcapping", logits)


def _windows(hf, source, kind, family: Family, layers: int):
  """(sliding_window, local_layers)."""
  window = hf.get("sliding_window", family.window)
  if kind == "llama" or (kind.startswith("qwen") and not hf.get("use_sliding_window", False)):
    window = None
  if kind in ("llama", "mistral") or window is None:
    return window, ()
  if hf.get("layer_types") is not None:
    unknown = [t for t in hf["layer_types"] if not isinstance(t, str) or t not in _LAYER_TYPES]
    if unknown:
      raise InputError(f"{source}: layer_types {one_line(unknown)} are not supported")
    if len(hf["layer_types"]) != layers:
      count = len(hf["layer_types"])
      raise InputError(f"{source}: field 'layer_types' names {count} layers of {layers}")
    return window, tuple(_LAYER_TYPES[t] for t in hf["layer_types"])
  if kind.startswith("qwen"):
    start = hf.get("max_window_layers", 28)
    return window, tuple(i >= start for i in range(layers))
  period = 2 if kind == "gemma2" else hf.get("sliding_window_pattern", 6)
  if period < 1:
    raise InputError(f"{source}: field 'sliding_window_pattern' must be positive, not {period}")
  return window, tuple((i + 1) % period != 0 for i in range(layers))


def _rope(hf, source, kind, family) -> dict:
  """The rope fields: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of 4."""
  rope = hf.get("rope_parameters") or {}
  # Gemma 3 nests them by layer type.
  local, rope = rope.get("sliding_attention") or {}, rope.get("full_attention") or rope
  rope = {**rope, **(hf.get("rope_scaling") or {})}
  fields = {"rope_theta": rope.get("rope_theta", hf.get("rope_theta", family.rope_theta))}
  if kind == "gemma3_text":
    fields["rope_local_theta"] = local.get("rope_theta", hf.get("rope_local_base_freq", 10_000.0))
    if local.get("rope_type", "default") != "default":
      raise InputError(f"{source}: scaled rope in windowed layers is not supported")
  scaling = rope.get("rope_type", rope.get("type", "default"))
  needed = {
    "linear": ("factor",),
    "llama3": (
      "factor",
      "low_freq_factor",
      "high_freq_factor",
      "original_max_position_embeddings",
    ),
  }
  missing = [name for name in needed.get(scaling, ()) if name not in rope]
  if missing:
    raise InputError(f"{source}: rope scaling {scaling!r} needs the field {missing[0]!r}")
  if scaling == "linear":
    fields["rope_scaling"] = RopeScaling("linear", float(rope["factor"]))
  elif scaling == "llama3":
    fields["rope_scaling"] = RopeScaling(
      "llama3",
      float(rope["factor"]),
      float(rope["low_freq_factor"]),
      float(rope["high_freq_factor"]),
      rope["original_max_position_embeddings"],
    )
  elif scaling != "default":
    raise InputError(f"{source}: rope scaling {scaling!r} is not supported; linear and llama3 are")
  return fields


def _rope_scaling_to_hf(scaling: RopeScaling | None) -> dict | None:
  if scaling is None:
    return None
  out = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling.kind == "llama3":
    out["low_freq_factor"] = scaling.low_freq_factor
    out["high_freq_factor"] = scaling.high_freq_factor
    out["original_max_position_embeddings"] = scaling.original_max_length
  return out
