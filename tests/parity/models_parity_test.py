"""Our transformer against Hugging Face's, in float32: every family, both directions.

Logits agree when max|Δ| <= 2e-4 of the largest logit.  The references are made and run by
transformers and peft; ours see only the files those wrote, or wrote the files those read.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from align_jax import models  # noqa: E402

TOLERANCE = 2e-4
ROWS, LENGTH, VOCAB = 2, 20, 96
SMALL = dict(
  vocab_size=VOCAB,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=4,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=512,
  initializer_range=0.15,  # logits of order ten, so that an error shows
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
  attn_implementation="eager",
)
LLAMA3_ROPE = dict(
  rope_type="llama3",
  rope_theta=10_000.0,
  factor=8.0,
  low_freq_factor=1.0,
  high_freq_factor=4.0,
  original_max_position_embeddings=16,  # so short that all three branches are taken
)
LINEAR_ROPE = dict(rope_type="linear", rope_theta=5_000.0, factor=4.0)
MIXED = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
CASES = {
  "llama2-untied": ("LlamaConfig", dict(num_key_value_heads=4, tie_word_embeddings=False)),
  "llama3-tied": ("LlamaConfig", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
  "llama-linear": ("LlamaConfig", dict(rope_parameters=LINEAR_ROPE, head_dim=16)),
  "mistral": ("MistralConfig", dict(sliding_window=5, head_dim=8)),
  "qwen2": ("Qwen2Config", dict(tie_word_embeddings=True)),
  "qwen2-windowed": (
    "Qwen2Config",
    dict(use_sliding_window=True, sliding_window=5, max_window_layers=2),
  ),
  "qwen3": ("Qwen3Config", dict(head_dim=16, num_key_value_heads=1)),
  "gemma2": (
    "Gemma2Config",
    dict(
      head_dim=16,
      sliding_window=5,
      query_pre_attn_scalar=24,
      attn_logit_softcapping=5.0,
      final_logit_softcapping=12.0,
    ),
  ),
  "gemma3": (
    "Gemma3TextConfig",
    dict(
      head_dim=16,
      sliding_window=5,
      query_pre_attn_scalar=20,
      layer_types=MIXED,
      rope_parameters={
        "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
        "sliding_attention": dict(rope_type="default", rope_theta=1e4),
      },
    ),
  ),
}


@dataclasses.dataclass
class Pair:
  """The same weights on both sides, and our forward pass compiled for [ROWS, LENGTH]."""

  reference: object
  model: models.Transformer
  params: dict
  folder: str

  def __post_init__(self):
    self.forward = jax.jit(
      lambda params, tokens, segments: self.model.apply(
        {"params": params}, tokens, segment_ids=segments
      )
    )

  def ours(self, tokens, segments=None):
    segments = np.ones_like(tokens) if segments is None else segments
    return np.asarray(self.forward(self.params, tokens, segments))


@pytest.fixture(autouse=True)
def highest_precision():
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
  kind, changes = CASES[request.param]
  torch.manual_seed(0)
  config = getattr(transformers, kind)(**{**SMALL, **changes})
  reference = transformers.AutoModelForCausalLM.from_config(config).eval()
  shake_vectors(reference)
  folder = str(tmp_path_factory.mktemp(request.param))
  reference.save_pretrained(folder, max_shard_size="60KB")
  return Pair(reference, *models.load_pretrained(folder), folder)


@pytest.fixture(scope="module")
def tokens():
  return np.random.default_rng(0).integers(1, VOCAB, (ROWS, LENGTH)).astype(np.int32)


def shake_vectors(reference):
  """Norms start at one (or zero) and biases at zero, where a misplaced one would not show."""
  with torch.no_grad():
    for parameter in reference.parameters():
      if parameter.ndim == 1:
        parameter.add_(0.3 * torch.randn_like(parameter))


def theirs(reference, tokens, mask=None):
  with torch.no_grad():
    mask = None if mask is None else torch.tensor(mask)
    return reference(torch.tensor(tokens, dtype=torch.long), attention_mask=mask).logits.numpy()


def assert_close(ours, reference):
  scale = np.abs(reference).max()
  assert scale > 1.0, "logits this small prove nothing"
  error = np.abs(ours - reference).max() / scale
  print(f"max relative logit error {error:.1e}")
  assert error <= TOLERANCE


def decode_greedily(model, params, prompt, count):
  """`count` tokens after `prompt` [P], by prefill and then one token at a time."""
  step = jax.jit(
    lambda params, cache, tokens, positions: model.apply(
      {"params": params, "cache": cache}, tokens, positions, mutable=["cache"]
    )
  )
  cache = models.init_cache(model, 1, len(prompt) + count)
  logits, state = step(params, cache, prompt[None], None)
  out = [int(logits[0, -1].argmax())]
  for position in range(len(prompt), len(prompt) + count - 1):
    last = jnp.full((1, 1), out[-1])
    logits, state = step(params, state["cache"], last, jnp.full((1, 1), position))
    out.append(int(logits[0, -1].argmax()))
  return out


def generate_greedily(reference, prompt, count):
  ids = torch.tensor(prompt[None], dtype=torch.long)
  with torch.no_grad():
    out = reference.generate(
      ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
      do_sample=False, pad_token_id=0,
    )  # fmt: skip
  return out[0, len(prompt) :].tolist()


class TestEveryFamily:
  def test_logits_of_whole_rows(self, pair, tokens):
    assert_close(pair.ours(tokens), theirs(pair.reference, tokens))

  @pytest.mark.parametrize("side", ["left", "right"])
  def test_padding_on_either_side(self, pair, tokens, side):
    mask = np.ones_like(tokens)
    if side == "left":
      mask[0, :7] = 0
    else:
      mask[0, -7:] = 0
    real = mask.astype(bool)
    ours, reference = pair.ours(tokens, mask), theirs(pair.reference, tokens, mask)
    assert_close(ours[real], reference[real])

  def test_packed_segments_equal_separate_runs(self, pair, tokens):
    lengths = (8, 9)
    packed = np.zeros_like(tokens)
    segments = np.zeros_like(tokens)
    reference = np.zeros((ROWS, LENGTH, VOCAB), np.float32)
    start = 0
    for number, length in enumerate(lengths, 1):
      part = slice(start, start + length)
      packed[:, part], segments[:, part] = tokens[:, :length] + number - 2, number
      reference[:, part] = theirs(pair.reference, packed[:, part])
      start += length
    real = segments > 0
    assert_close(pair.ours(packed, segments)[real], reference[real])

  def test_greedy_generations_are_identical(self, pair, tokens):
    prompt = tokens[0, :11]
    ours = decode_greedily(pair.model, pair.params, prompt, 64)
    assert ours == generate_greedily(pair.reference, prompt, 64)

  def test_export_is_loaded_by_transformers(self, pair, tokens, tmp_path):
    models.save_pretrained(str(tmp_path), pair.model, pair.params, shard_bytes=50_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert type(again) is type(pair.reference)
    np.testing.assert_array_equal(
      theirs(again, tokens), theirs(pair.reference, tokens)
    )  # the same numbers in, the same numbers out


def adapted(model, params, lora, tokens):
  run = jax.jit(lambda params, lora: model.apply({"params": params, "lora": lora}, tokens))
  return np.asarray(run(params, lora))


class TestPeft:
  @pytest.fixture(scope="class")
  def base(self, tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**{**SMALL, "tie_word_embeddings": True})
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    folder = str(tmp_path_factory.mktemp("base"))
    reference.save_pretrained(folder)
    return Pair(reference, *models.load_pretrained(folder), folder)

  def test_reads_an_adapter_of_peft(self, base, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    reference = transformers.AutoModelForCausalLM.from_pretrained(base.folder).eval()
    wanted = ["q_proj", "o_proj", "down_proj"]
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=wanted, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(reference, config)
    with torch.no_grad():
      for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
          parameter.copy_(0.3 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path)
    model, lora = models.load_adapter(str(tmp_path), base.model)
    ours = adapted(model, base.params, lora, tokens)
    merged = models.merge_lora(base.params, lora, model.lora_scale)
    reference = theirs(wrapped, tokens)
    assert np.abs(reference - theirs(base.reference, tokens)).max() > 1.0
    assert_close(ours, reference)
    assert_close(dataclasses.replace(base, params=merged).ours(tokens), reference)

  def test_peft_reads_an_adapter_of_ours(self, base, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    model = dataclasses.replace(base.model, lora_scale=2.5)
    lora = models.init_lora(jax.random.key(0), model, rank=4)
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), lora)
    models.save_adapter(str(tmp_path), model, lora, base=base.folder)
    reference = transformers.AutoModelForCausalLM.from_pretrained(base.folder).eval()
    wrapped = peft.PeftModel.from_pretrained(reference, tmp_path)
    ours = adapted(model, base.params, lora, tokens)
    assert_close(ours, theirs(wrapped, tokens))

  def test_export_merges_the_adapter(self, base, tokens, tmp_path):
    model = dataclasses.replace(base.model, lora_scale=0.5)
    lora = models.init_lora(jax.random.key(3), model, rank=2, targets=("value", "up"))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    models.save_pretrained(str(tmp_path), model, base.params, lora=lora)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = adapted(model, base.params, lora, tokens)
    assert_close(ours, theirs(again, tokens))


def test_saved_config_says_what_the_family_says(pair, tmp_path):
  """Every field of the reference's config.json that we write has the reference's value."""
  models.save_pretrained(str(tmp_path), pair.model, pair.params)
  ours = json.loads((tmp_path / "config.json").read_text())
  again = transformers.AutoConfig.from_pretrained(tmp_path)
  for name in ours:
    if name in ("torch_dtype", "architectures", "rope_theta", "rope_scaling"):
      continue
    if name == "max_window_layers" and not pair.reference.config.use_sliding_window:
      continue  # without a window it means nothing
    if hasattr(pair.reference.config, name):
      assert getattr(again, name) == getattr(pair.reference.config, name), name
  assert again.rope_parameters == pair.reference.config.rope_parameters
