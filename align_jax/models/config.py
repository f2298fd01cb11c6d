"""What a decoder is made of: one frozen, hashable dataclass for every supported family."""

import dataclasses
import math

REMAT = ("none", "dots", "full")
ACTIVATIONS = ("silu", "gelu_tanh")
MOST_LAYERS = 10_000  # a file that says more is damaged
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("auto", "xla", "splash", "blockwise")


_POSITIVE = (
  "norm_eps", "attention_scale", "attention_softcap", "logit_softcap", "rope_theta",
  "rope_local_theta", "max_length",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Stretched rotary frequencies: `linear` divides all by `factor`, `llama3` only the low ones."""

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192

  def __post_init__(self):
    if self.kind not in ("linear", "llama3"):
      raise ValueError(f"rope scaling {self.kind!r} is not supported; linear and llama3 are")
    for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_length"):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f"rope scaling: {name} must be positive, not {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer; the defaults are plain Llama, from scratch and tiny."""

  vocab_size: int = 512
  embed_dim: int = 128
  num_layers: int = 4
  num_heads: int = 4
  num_kv_heads: int = 4
  head_dim: int = 32
  mlp_dim: int = 384
  max_length: int = 2048  # positions the model was made for; written to checkpoints, not enforced
  family: str = "llama"  # Hugging Face's model_type: decides the names in a saved folder
  activation: str = "silu"
  tie_embeddings: bool = True
  scale_embeddings: bool = False  # Gemma: embeddings times sqrt(embed_dim)
  norm_eps: float = 1e-6
  norm_plus_one: bool = False  # Gemma: weights are stored minus one
  post_norms: bool = False  # Gemma: a second norm behind attention and behind the MLP
  qk_norm: bool = False  # Qwen3, Gemma 3: queries and keys normalised per head
  qkv_bias: bool = False  # Qwen2
  attention_scale: float | None = None  # of q.k; None: head_dim ** -0.5
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  rope_theta: float = 10_000.0
  rope_local_theta: float | None = None  # base of the windowed layers where it differs (Gemma 3)
  rope_scaling: RopeScaling | None = None  # of the layers without `rope_local_theta`
  sliding_window: int | None = None  # tokens seen by a windowed layer, itself included
  local_layers: tuple[bool, ...] = ()  # which layers are windowed; empty: all, if there is a window
  dtype: str = "float32"  # of the computation
  param_dtype: str = "float32"
  remat: str = "none"  # what the backward pass recomputes: none, dots (keeps matmuls), full
  # Of whole rows: xla (all scores at once), splash (TPU kernel) or blockwise (tiles, any platform);
  # auto is splash on TPU, blockwise on CPU and where time is split over the mesh, and xla elsewhere.
  attention_impl: str = "auto"

  def __post_init__(self):
    for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim"):
      if not 1 <= getattr(self, name) < 2**31:
        raise ValueError(f"{name} must be positive and of 31 bits, not {getattr(self, name)}")
    if self.num_layers > MOST_LAYERS:
      raise ValueError(f"num_layers is {self.num_layers}: no model is so deep")
    for name in _POSITIVE:
      value = getattr(self, name)
      if value is not None and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}"
      )
    if self.head_dim < 2 or self.head_dim % 2:
      raise ValueError(f"head_dim must be even for rotary positions, not {self.head_dim}")
    if self.local_layers and len(self.local_layers) != self.num_layers:
      raise ValueError(f"local_layers names {len(self.local_layers)} of {self.num_layers} layers")
    if any(self.local_layers) and self.sliding_window is None:
      raise ValueError("local_layers needs a sliding_window")
    if self.sliding_window is not None and self.sliding_window < 1:
      raise ValueError(f"sliding_window must be positive, not {self.sliding_window}")
    for name, known in (
      ("activation", ACTIVATIONS),
      ("remat", REMAT),
      ("dtype", DTYPES),
      ("param_dtype", DTYPES),
      ("attention_impl", ATTENTION),
    ):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

  @property
  def query_scale(self) -> float:
    """What q.k is multiplied by."""
    return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

  @property
  def windowed(self) -> tuple[bool, ...]:
    """For every layer, whether it sees only the last `sliding_window` tokens."""
    return self.local_layers or (self.sliding_window is not None,) * self.num_layers
