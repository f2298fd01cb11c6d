"""config.json, of transformers 4 and 5, to ModelConfig and back."""

import dataclasses

import pytest

from align_jax import models
from align_jax.errors import InputError
from align_jax.models import hf_config

BASE = dict(
  vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
  num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5,
)  # fmt: skip
LLAMA3 = dict(
  factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def read(**fields):
  return hf_config.from_hf({**BASE, **fields}, "config.json")


class TestReading:
  def test_llama_3_2_as_on_the_hub(self):
    old = read(
      model_type="llama", head_dim=32, rope_theta=500000.0, hidden_act="silu",
      rope_scaling={**LLAMA3, "rope_type": "llama3"}, tie_word_embeddings=True,
      attention_bias=False, mlp_bias=False, bos_token_id=128000, eos_token_id=[128001, 128008],
    )  # fmt: skip
    assert old.rope_theta == 500000.0 and old.head_dim == 32 and old.tie_embeddings
    assert old.rope_scaling == models.RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    new = read(
      model_type="llama", head_dim=32, tie_word_embeddings=True,
      rope_parameters={**LLAMA3, "rope_type": "llama3", "rope_theta": 500000.0},
    )  # fmt: skip
    assert new == old

  def test_llama_2_computes_its_head_dim(self):
    config = read(model_type="llama", rope_scaling=None, pretraining_tp=1)
    assert config.head_dim == 16 and not config.tie_embeddings and config.sliding_window is None

  @pytest.mark.parametrize("window, windowed", [(4096, True), (None, False)])
  def test_mistral_of_both_ages(self, window, windowed):
    assert read(model_type="mistral", sliding_window=window).windowed == (windowed,) * 6

  def test_qwen2_has_biases_and_a_window_it_does_not_use(self):
    config = read(
      model_type="qwen2", sliding_window=32768, use_sliding_window=False, max_window_layers=4
    )
    assert config.qkv_bias and config.windowed == (False,) * 6
    used = read(model_type="qwen2", sliding_window=64, use_sliding_window=True, max_window_layers=4)
    assert used.windowed == (False,) * 4 + (True,) * 2

  def test_qwen3_normalises_heads(self):
    config = read(model_type="qwen3", head_dim=128, attention_bias=False, rope_theta=1e6)
    assert config.qk_norm and not config.qkv_bias and config.head_dim == 128

  def test_gemma2_as_on_the_hub(self):
    config = read(
      model_type="gemma2", head_dim=24, query_pre_attn_scalar=144, sliding_window=4096,
      attn_logit_softcapping=50.0, final_logit_softcapping=30.0, hidden_act="gelu_pytorch_tanh",
      hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    assert config.windowed == (True, False) * 3
    assert config.attention_scale == pytest.approx(1 / 12)
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert config.norm_plus_one and config.post_norms and config.tie_embeddings

  def test_gemma3_of_both_ages(self):
    common = dict(model_type="gemma3_text", head_dim=16, query_pre_attn_scalar=16)
    common |= dict(sliding_window=512, hidden_activation="gelu_pytorch_tanh")
    old = read(
      **common, rope_theta=1e6, rope_local_base_freq=10_000.0, sliding_window_pattern=6,
      rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    new = read(
      **common,
      layer_types=["sliding_attention"] * 5 + ["full_attention"],
      rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
      },
    )
    assert new == old
    assert old.windowed == (True,) * 5 + (False,)
    assert old.rope_scaling.factor == 8.0 and old.rope_local_theta == 10_000.0

  @pytest.mark.parametrize(
    "fields, said",
    [
      (dict(model_type="mixtral"), "mixtral"),
      (dict(), "model_type None"),
      (dict(model_type="llama", attention_bias=True), "attention_bias"),
      (dict(model_type="llama", mlp_bias=True), "mlp_bias"),
      (dict(model_type="llama", hidden_act="gelu"), "gelu"),
      (dict(model_type="llama", partial_rotary_factor=0.5), "partial_rotary_factor"),
      (dict(model_type="llama", quantization_config={"bits": 4}), "quantization_config"),
      (dict(model_type="llama", rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
      (dict(model_type="llama", hidden_size=None), "hidden_size"),
      (dict(model_type="llama", num_key_value_heads=3), "num_kv_heads 3"),
      (dict(model_type="qwen2", use_sliding_window=True, layer_types=["chunked"]), "chunked"),
    ],
  )
  def test_what_is_not_supported_is_named(self, fields, said):
    with pytest.raises(InputError, match=said) as caught:
      read(**fields)
    assert "config.json" in str(caught.value)


class TestWriting:
  def test_what_a_family_has_no_word_for_is_named(self):
    for field, value in [("qk_norm", True), ("sliding_window", 8), ("logit_softcap", 30.0)]:
      config = dataclasses.replace(models.ModelConfig(), **{field: value})
      with pytest.raises(InputError, match=field):
        hf_config.to_hf(config)

  def test_an_unknown_family_is_named(self):
    with pytest.raises(InputError, match="gpt5"):
      hf_config.to_hf(models.ModelConfig(family="gpt5"))

  def test_the_default_model_is_a_llama(self):
    written = hf_config.to_hf(models.ModelConfig())
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert hf_config.from_hf(written, "") == models.ModelConfig()
