"""Tests of generation against full forward passes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import models, sampling, sharding
from align_jax.errors import InputError
from align_jax.sampling import decode, distribution, requests

EOS, PAD, NEW = 1, 0, 12
VOCAB = 24


@pytest.fixture(scope="module")
def model():
  config = models.ModelConfig(
    vocab_size=VOCAB, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, tie_embeddings=False,
  )  # fmt: skip
  return models.Transformer(config, lora_scale=2.0)


@pytest.fixture(scope="module")
def params(model):
  # Ten times the usual scale, so that the distributions are far from uniform.
  params = jax.jit(lambda: models.init_params(model, jax.random.key(0)))()
  return {**params, "unembedding": params["unembedding"] * 10}


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(2, VOCAB, n) for n in (3, 9, 1, 6, 5)]


@pytest.fixture(scope="module")
def generate(model, params):
  def run(prompts, rng=0, **options):
    settings = {"max_new_tokens": NEW, "eos_ids": [EOS], "pad_id": PAD}
    return sampling.generate(
      model, params, prompts, rng=jax.random.key(rng), **{**settings, **options}
    )

  return run


@pytest.fixture(scope="module")
def samples(generate, prompts):
  return generate(prompts, temperature=0.7)


def _trainer_logprobs(model, params, samples, temperature):
  """[B, S] as the trainer computes them: one forward pass over whole rows, padding masked."""
  ends = samples.prompt_lengths + samples.lengths
  segments = (np.arange(samples.tokens.shape[1]) < ends[:, None]).astype(np.int32)
  score = jax.jit(functools.partial(models.token_logprobs, model, temperature=temperature))
  logprobs = score({"params": params}, samples.tokens, segment_ids=segments)
  return np.where(samples.response_mask[:, 1:], logprobs, 0.0)


def test_greedy_equals_the_argmax_of_full_forwards(model, params, generate, prompts):
  samples = generate(prompts, temperature=0)
  forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
  for prompt, response in zip(prompts, samples.responses()):
    tokens = np.full((1, 32), PAD)
    tokens[0, : len(prompt)] = prompt
    for t, token in enumerate(response, start=len(prompt)):
      assert token == np.argmax(forward(tokens)[0, t - 1])
      tokens[0, t] = token
    assert len(response) == NEW or response[-1] == EOS


def test_logprobs_are_the_trainers(model, params, samples):
  expected = _trainer_logprobs(model, params, samples, 0.7)
  np.testing.assert_allclose(samples.logprobs[:, 1:], expected, atol=1e-4)
  assert not np.allclose(expected, _trainer_logprobs(model, params, samples, 1.0), atol=1e-2)


def test_logprobs_are_those_of_the_truncated_distribution(model, params, generate, prompts):
  samples = generate(prompts, temperature=0.9, top_k=5, top_p=0.8)
  decoding = sampling.make_decoding(temperature=0.9, top_k=5, top_p=0.8)
  logits = jax.jit(model.apply)({"params": params}, samples.tokens)[:, :-1]
  every = sampling.distribution_logprobs(logits, decoding)
  expected = np.take_along_axis(every, samples.tokens[:, 1:, None], axis=-1)[..., 0]
  mask = samples.response_mask[:, 1:]
  np.testing.assert_allclose(samples.logprobs[:, 1:][mask], expected[mask], atol=1e-4)


def test_rows_are_prompt_then_response_then_padding(samples, prompts):
  for row, prompt in enumerate(prompts):
    n, length = len(prompt), samples.lengths[row]
    np.testing.assert_array_equal(samples.tokens[row, :n], prompt)
    assert samples.prompt_lengths[row] == n
    np.testing.assert_array_equal(np.flatnonzero(samples.response_mask[row]), n + np.arange(length))
    np.testing.assert_array_equal(samples.tokens[row, n + length :], PAD)
    assert np.all(samples.logprobs[row][~samples.response_mask[row]] == 0)


@pytest.mark.parametrize("index", [0, 3])
def test_a_response_does_not_depend_on_its_batch(generate, prompts, samples, index):
  alone = generate([prompts[index]], temperature=0.7, prompt_ids=[index])
  np.testing.assert_array_equal(alone.responses()[0], samples.responses()[index])


def test_order_and_batch_size_change_nothing(generate, prompts, samples):
  backwards = generate(prompts[::-1], temperature=0.7, prompt_ids=[4, 3, 2, 1, 0])
  split = generate(prompts, temperature=0.7, batch_size=2)
  for row in range(5):
    np.testing.assert_array_equal(backwards.responses()[4 - row], samples.responses()[row])
    np.testing.assert_array_equal(split.responses()[row], samples.responses()[row])
  assert split.tokens.shape == samples.tokens.shape


def test_the_id_and_the_seed_make_a_difference(generate, prompts):
  same = [prompts[0]] * 5
  first = generate(same, temperature=2.0).tokens
  assert len(np.unique(first, axis=0)) == 5
  assert not np.array_equal(first, generate(same, rng=1, temperature=2.0).tokens)
  np.testing.assert_array_equal(first, generate(same, temperature=2.0).tokens)
  one_id = generate(same, temperature=2.0, prompt_ids=[7] * 5)
  assert len(np.unique(one_id.tokens, axis=0)) == 1


def test_every_eos_stops_and_belongs_to_the_response(generate, prompts):
  stops = [EOS, 5, 6, 7]
  samples = generate(prompts + prompts[:3], temperature=1.5, eos_ids=stops)
  assert samples.finished.any() and samples.lengths.max() > 1
  for finished, response in zip(samples.finished, samples.responses()):
    assert not np.isin(response[:-1], stops).any()
    assert finished == np.isin(response[-1], stops)
    assert finished or len(response) == NEW


def test_no_eos_fills_the_budget(generate, prompts):
  samples = generate(prompts, eos_ids=(-1,))
  np.testing.assert_array_equal(samples.lengths, NEW)
  assert not samples.finished.any()


def test_pad_equal_to_eos_changes_nothing_but_the_padding(generate, prompts):
  prompts = [np.append(EOS, p) for p in prompts]  # an EOS inside a prompt is no end either
  apart = generate(prompts, temperature=1.5)
  together = generate(prompts, temperature=1.5, pad_id=EOS)
  np.testing.assert_array_equal(apart.response_mask, together.response_mask)
  np.testing.assert_array_equal(apart.logprobs, together.logprobs)
  np.testing.assert_array_equal(
    together.tokens[together.response_mask], apart.tokens[apart.response_mask]
  )


def test_padded_prompts_with_lengths_are_the_same_prompts(generate, prompts, samples):
  padded = np.full((5, 11), 17)  # whatever lies behind a prompt is not read
  for row, prompt in zip(padded, prompts):
    row[: len(prompt)] = prompt
  again = generate(padded, lengths=np.array([len(p) for p in prompts]), temperature=0.7)
  np.testing.assert_array_equal(again.tokens, samples.tokens)


def test_a_lora_collection_acts(model, params, generate, prompts):
  lora = models.init_lora(jax.random.key(1), model, rank=2)
  bare = generate(prompts, temperature=0)
  np.testing.assert_array_equal(generate(prompts, temperature=0, lora=lora).tokens, bare.tokens)
  lora = jax.tree.map(lambda x: x + 0.1, lora)
  adapted = generate(prompts, temperature=0, lora=lora)
  assert not np.array_equal(adapted.tokens, bare.tokens)
  merged = sampling.generate(
    model, models.merge_lora(params, lora, 2.0), prompts, rng=jax.random.key(0), temperature=0,
    max_new_tokens=NEW, eos_ids=[EOS], pad_id=PAD,
  )  # fmt: skip
  np.testing.assert_array_equal(adapted.tokens, merged.tokens)


def test_few_programs_serve_many_shapes(generate, prompts):
  generate(prompts)
  run = decode.decode_on("cpu")
  before = run._cache_size()
  for count, length, temperature in itertools.product((5, 8), (2, 7, 16), (0.5, 1.5)):
    generate([np.full(length, 3)] * count, temperature=temperature)
  assert run._cache_size() == before
  assert {requests.row_bucket(n) for n in range(1, 65)} == {1, 2, 4, 8, *range(16, 65, 8)}


def test_a_mesh_changes_nothing(generate, prompts, samples):
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  np.testing.assert_array_equal(
    generate(prompts, temperature=0.7, mesh=mesh).tokens, samples.tokens
  )


def test_the_compiled_parts_accept_shapes_alone(model):
  shape, rng = jax.ShapeDtypeStruct, jax.eval_shape(lambda: jax.random.key(0))
  policy = decode.Policy(({"params": models.abstract_params(model)},))
  decoding, numbers, eos = sampling.Decoding(), shape((4,), jnp.int32), shape((1,), jnp.int32)
  prefilled = decode.prefill.lower(
    model, policy, shape((4, 16), jnp.int32), numbers, shape((4,), jnp.uint32), numbers, rng, decoding
  ).out_info  # fmt: skip
  assert prefilled.logits.shape == (4, VOCAB)
  flight = decode.empty_flight.lower(
    model, prefilled, policies=1, rows=8, slots=32, budget=3
  ).out_info
  eights = shape((8,), jnp.int32)
  flight = decode.admit.lower(
    flight, prefilled, eights, eights, eights, eos, decoding
  ).out_info  # fmt: skip
  flight = decode.decode_on("cpu").lower(
    model, policy, flight, shape((8,), bool), 3, 8, eos, decoding
  ).out_info  # fmt: skip
  assert flight.rows.tokens.shape == (8, 3)


def test_texts_come_without_special_tokens(samples):
  class Tokenizer:
    def decode(self, ids, skip_special_tokens):
      return " ".join(str(i) for i in ids if not (skip_special_tokens and i == EOS))

  texts = sampling.decode_texts(samples, Tokenizer())
  assert len(texts) == 5 and all(str(EOS) not in text.split() for text in texts)


@pytest.mark.parametrize(
  "prompts, options, message",
  [
    ([np.array([3]), np.array([], int)], {}, "prompt 1 is empty"),
    ([], {}, "no prompts"),
    ([np.array([3])], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ([np.array([3])], {"batch_size": 0}, "batch_size must be at least 1, the"),
    ([np.array([3])], {"prompt_ids": [0, 1]}, "1 prompts and 2 prompt_ids"),
    ([np.array([3])], {"lengths": np.array([1, 1])}, "1 prompts and 2 lengths"),
    ([np.array([3])], {"temperature": 0, "top_k": 3}, "would be ignored"),
  ],
)
def test_wrong_input_is_refused(generate, prompts, options, message):
  with pytest.raises(InputError, match=message):
    generate(prompts, **options)


class Words:
  """A tokenizer whose tokens are single letters, but EOS nothing."""

  def decode(self, ids, skip_special_tokens):
    assert skip_special_tokens
    return "".join(chr(97 + i) for i in ids if i not in (EOS, PAD))


class TestSamplesPerPrompt:
  def test_rows_come_prompt_by_prompt_and_equal_separate_calls(self, generate, prompts):
    together = generate(prompts, temperature=1.2, samples_per_prompt=3)
    assert together.tokens.shape[0] == 15
    np.testing.assert_array_equal(together.prompt_lengths, np.repeat([3, 9, 1, 6, 5], 3))
    fewer = generate(prompts, temperature=1.2, samples_per_prompt=2, batch_size=4)
    for row in range(10):
      of_three = together.responses()[row // 2 * 3 + row % 2]
      np.testing.assert_array_equal(fewer.responses()[row], of_three)

  def test_samples_of_one_prompt_differ(self, generate, prompts):
    rows = generate(prompts[:1], temperature=2.0, samples_per_prompt=4).tokens
    assert len(np.unique(rows, axis=0)) == 4

  def test_the_key_is_that_of_seed_prompt_sample_and_position(self, model, params, generate):
    """A naive loop over full forward passes, with the keys folded by hand."""
    prompt = np.array([3, 4, 5])
    samples = generate([prompt, prompt], prompt_ids=[7, 9], samples_per_prompt=2, rng=5)
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    for row, (prompt_id, index) in enumerate(itertools.product((7, 9), (0, 1))):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), prompt_id), index)
      tokens = np.full((1, 16), PAD)
      tokens[0, :3] = prompt
      for t, token in enumerate(samples.responses()[row], start=3):
        logits = forward(tokens)[:, t - 1]
        expected, logprob = distribution.draw(
          jax.random.fold_in(key, t)[None], logits, sampling.make_decoding()
        )
        assert token == expected[0]
        np.testing.assert_allclose(samples.logprobs[row, t], logprob[0], atol=1e-4)
        tokens[0, t] = token


class TestStops:
  def test_a_stop_ends_the_response_across_tokens(self, generate, prompts):
    free = generate(prompts, temperature=1.5, eos_ids=[-1])
    texts = sampling.decode_texts(free, Words())
    stop = [texts[0][4:6], texts[1][2:4]]
    stopped = generate(prompts, temperature=1.5, eos_ids=[-1], stop=stop, tokenizer=Words())
    for row, text in enumerate(sampling.decode_texts(stopped, Words())):
      ends = [texts[row].find(s) + len(s) for s in stop if s in texts[row]]
      expected = texts[row][: min(ends)] if ends else texts[row]
      assert text == expected and stopped.finished[row] == bool(ends)
    mask = stopped.response_mask
    np.testing.assert_array_equal(stopped.tokens[mask], free.tokens[mask])
    np.testing.assert_array_equal(stopped.logprobs[mask], free.logprobs[mask])
    behind = np.arange(mask.shape[1]) >= (stopped.prompt_lengths + stopped.lengths)[:, None]
    assert (stopped.tokens[behind] == PAD).all() and (stopped.logprobs[~mask] == 0).all()
    assert 0 < stopped.finished.sum() and behind.any()
    cut = sampling.decode_texts(stopped, Words(), stop)
    assert all(not any(s in text for s in stop) for text in cut)


def test_each_prompt_may_have_its_budget(generate, prompts):
  samples = generate(prompts, eos_ids=[-1], max_new_tokens=[1, 12, 5, 2, 7], samples_per_prompt=2)
  np.testing.assert_array_equal(samples.lengths, np.repeat([1, 12, 5, 2, 7], 2))
  assert samples.tokens.shape[1] == 16 + 12
