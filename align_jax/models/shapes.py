"""Published model shapes by name, for plans that need no weights (`experiments.compile`)."""

import difflib

from align_jax.errors import InputError
from align_jax.models.config import ModelConfig, RopeScaling

_LLAMA3 = {"vocab_size": 128_256, "num_kv_heads": 8, "head_dim": 128, "tie_embeddings": False}
_LLAMA3 |= {"max_length": 8192, "rope_theta": 500_000.0, "norm_eps": 1e-5}
_LLAMA31 = _LLAMA3 | {"max_length": 131_072, "rope_scaling": RopeScaling("llama3", 8.0)}
_LLAMA32 = _LLAMA31 | {"tie_embeddings": True, "rope_scaling": RopeScaling("llama3", 32.0)}
_8B = {"embed_dim": 4096, "num_layers": 32, "num_heads": 32, "mlp_dim": 14_336}
_70B = {"embed_dim": 8192, "num_layers": 80, "num_heads": 64, "mlp_dim": 28_672}
_QWEN3 = {"vocab_size": 151_936, "num_kv_heads": 8, "head_dim": 128, "tie_embeddings": False}
_QWEN3 |= {"max_length": 40_960, "rope_theta": 1e6, "family": "qwen3", "qk_norm": True}

SHAPES = {
  "smollm2-135m": ModelConfig(
    vocab_size=49_152, embed_dim=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
    mlp_dim=1536, max_length=8192, rope_theta=100_000.0, norm_eps=1e-5,
  ),
  "llama3-8b": ModelConfig(**_LLAMA3, **_8B),
  "llama3-70b": ModelConfig(**_LLAMA3, **_70B),
  "llama3.1-8b": ModelConfig(**_LLAMA31, **_8B),
  "llama3.1-70b": ModelConfig(**_LLAMA31, **_70B),
  "llama3.2-1b": ModelConfig(
    **_LLAMA32 | {"head_dim": 64}, embed_dim=2048, num_layers=16, num_heads=32, mlp_dim=8192
  ),
  "llama3.2-3b": ModelConfig(
    **_LLAMA32, embed_dim=3072, num_layers=28, num_heads=24, mlp_dim=8192
  ),
  "qwen3-8b": ModelConfig(**_QWEN3, embed_dim=4096, num_layers=36, num_heads=32, mlp_dim=12_288),
  "qwen3-32b": ModelConfig(**_QWEN3, embed_dim=5120, num_layers=64, num_heads=64, mlp_dim=25_600),
}  # fmt: skip


def named_shape(name: str) -> ModelConfig:
  """The shape of that name; InputError with near names where there is none."""
  if name in SHAPES:
    return SHAPES[name]
  near = difflib.get_close_matches(name, SHAPES, n=1)
  hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SHAPES)}"
  raise InputError(f"{name!r} is no model shape; {hint}")
