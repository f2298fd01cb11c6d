"""What Hugging Face and GGUF call each family, its settings and its tensors: tables, no logic."""

from typing import NamedTuple

_PLAIN = {
  "activation": "silu",
  "scale_embeddings": False,
  "norm_plus_one": False,
  "post_norms": False,
  "qk_norm": False,
  "qkv_bias": False,
}
_GEMMA = {
  "activation": "gelu_tanh",
  "scale_embeddings": True,
  "norm_plus_one": True,
  "post_norms": True,
  "qk_norm": False,
  "qkv_bias": False,
}


class Family(NamedTuple):
  """One Hugging Face `model_type`."""

  architecture: str  # the class transformers builds
  gguf: str  # GGUF's general.architecture
  features: dict  # fields of ModelConfig that every model of the family shares
  tied: bool  # whether embeddings are tied where config.json does not say
  window: int | None = None  # sliding window where config.json does not say
  rope_theta: float = 10_000.0
  softcaps: tuple[float | None, float | None] = (None, None)  # attention, logits


FAMILIES = {
  "llama": Family("LlamaForCausalLM", "llama", _PLAIN, tied=False),
  "mistral": Family("MistralForCausalLM", "llama", _PLAIN, tied=False, window=4096),
  "qwen2": Family(
    "Qwen2ForCausalLM", "qwen2", {**_PLAIN, "qkv_bias": True}, tied=False, window=4096
  ),
  "qwen3": Family(
    "Qwen3ForCausalLM", "qwen3", {**_PLAIN, "qk_norm": True}, tied=False, window=4096
  ),
  "gemma2": Family(
    "Gemma2ForCausalLM", "gemma2", _GEMMA, tied=True, window=4096, softcaps=(50.0, 30.0)
  ),
  "gemma3_text": Family(
    "Gemma3ForCausalLM",
    "gemma3",
    {**_GEMMA, "qk_norm": True},
    tied=True,
    window=4096,
    rope_theta=1_000_000.0,
  ),
}

# (ours, Hugging Face, GGUF).  Matrices are [in, out] with us and [out, in] with them.
TOP_NAMES = (
  ("embedding", "model.embed_tokens.weight", "token_embd.weight"),
  ("final_norm", "model.norm.weight", "output_norm.weight"),
  ("unembedding", "lm_head.weight", "output.weight"),
)
LAYER_NAMES = (
  ("query", "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
  ("key", "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
  ("value", "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
  ("out", "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
  ("query_bias", "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
  ("key_bias", "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
  ("value_bias", "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
  ("query_norm", "model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
  ("key_norm", "model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
  ("gate", "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
  ("up", "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
  ("down", "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
  ("attention_norm", "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
)
# Hugging Face's "post_attention_layernorm" is the norm before the MLP, except in Gemma.
PRE_NORM_NAMES = (
  ("mlp_norm", "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
)
POST_NORM_NAMES = (
  (
    "attention_post_norm",
    "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.post_attention_norm.weight",
  ),
  ("mlp_norm", "model.layers.{}.pre_feedforward_layernorm.weight", "blk.{}.ffn_norm.weight"),
  (
    "mlp_post_norm",
    "model.layers.{}.post_feedforward_layernorm.weight",
    "blk.{}.post_ffw_norm.weight",
  ),
)


def names(post_norms: bool, fmt: str) -> dict[str, str]:
  """Our parameter to the tensor it is called in `fmt` ("hf" or "gguf"); {} stands for the layer."""
  column = ("hf", "gguf").index(fmt) + 1
  layer = LAYER_NAMES + (POST_NORM_NAMES if post_norms else PRE_NORM_NAMES)
  return {row[0]: row[column] for row in TOP_NAMES + layer}
