"""Tests of continuous batching: the same samples, in few rows, by few programs."""

import math

import jax
import numpy as np
import pytest

from align_jax import models, sampling, sharding
from align_jax.errors import InputError
from align_jax.sampling import decode, scheduler

EOS, PAD, NEW, VOCAB = 1, 0, 12, 24


class Letters:
  """A tokenizer whose tokens are single letters, but EOS and padding nothing."""

  def decode(self, ids, skip_special_tokens):
    assert skip_special_tokens
    return "".join(chr(97 + i) for i in ids if i not in (EOS, PAD))


@pytest.fixture(scope="module")
def model():
  config = models.ModelConfig(
    vocab_size=VOCAB, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, tie_embeddings=False,
  )  # fmt: skip
  return models.Transformer(config)


@pytest.fixture(scope="module")
def params(model):
  params = models.init_params(model, jax.random.key(0))
  return {**params, "unembedding": params["unembedding"] * 5}


@pytest.fixture(scope="module")
def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(2, VOCAB, n) for n in (3, 20, 1, 6, 17, 5, 9, 2, 13)]


@pytest.fixture(scope="module")
def generate(model, params, prompts):
  def run(**options):
    settings = {"max_new_tokens": NEW, "eos_ids": [EOS], "pad_id": PAD, "rng": jax.random.key(3)}
    settings |= {"samples_per_prompt": 3}
    return sampling.generate(model, params, prompts, **settings | options)

  return run


@pytest.fixture(scope="module")
def samples(generate):
  return generate()


def assert_same(found, expected):
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  np.testing.assert_array_equal(found.response_mask, expected.response_mask)
  np.testing.assert_array_equal(found.finished, expected.finished)
  np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 7])
def test_slots_change_nothing(generate, samples, slots):
  assert samples.finished.any() and not samples.finished.all()
  assert_same(generate(slots=slots), samples)


def test_refilling_late_changes_nothing(generate, samples, monkeypatch):
  monkeypatch.setattr("align_jax.sampling.engine.PATIENCE", 2)
  assert_same(generate(slots=7), samples)


def test_small_caches_grow_and_shrink(generate, samples, monkeypatch):
  sizes = []
  monkeypatch.setattr(scheduler, "SMALLEST_CACHE", 8)
  monkeypatch.setattr(scheduler, "SLACK", 2)
  resize = decode.resize
  monkeypatch.setattr(decode, "resize", lambda c, n, **k: sizes.append(n) or resize(c, n, **k))
  assert_same(generate(slots=2), samples)
  steps = np.sign(np.diff(sizes))
  assert (steps > 0).any() and (steps < 0).any()


def test_no_row_waits_for_the_longest(generate, monkeypatch):
  """27 rows of 2 and 12 tokens in 7 slots: the steps are the tokens shared out, nearly."""
  steps = []
  run = decode.decode_on("cpu")

  def counted(model, policy, flight, *args, **options):
    before = np.asarray(flight.rows.counts)
    flight = run(model, policy, flight, *args, **options)
    steps.append(int((flight.rows.counts - before).max()))
    return flight

  monkeypatch.setattr(decode, "decode_on", lambda platform: counted)
  budgets = [2, 12] * 4 + [2]
  found = generate(slots=7, eos_ids=[-1], max_new_tokens=budgets)
  tokens = 3 * sum(budgets) - 27  # the first of a row comes with its prefill
  np.testing.assert_array_equal(found.lengths, np.repeat(budgets, 3))
  assert math.ceil(tokens / 7) <= sum(steps) <= math.ceil(tokens / 7) + 12


@pytest.mark.parametrize("slots", [None, 7])
def test_stop_strings_end_rows_and_free_their_slots(generate, slots, monkeypatch):
  monkeypatch.setattr(scheduler, "STOP_EVERY", 3)
  free = generate(eos_ids=[-1])
  texts = sampling.decode_texts(free, Letters())
  stop = [texts[0][4:6], texts[5][2:4], texts[11][7]]
  stopped = generate(eos_ids=[-1], stop=stop, tokenizer=Letters(), slots=slots)
  for row, text in enumerate(sampling.decode_texts(stopped, Letters())):
    ends = [texts[row].find(s) + len(s) for s in stop if s in texts[row]]
    assert text == (texts[row][: min(ends)] if ends else texts[row])
    assert stopped.finished[row] == bool(ends)
  mask = stopped.response_mask
  np.testing.assert_array_equal(stopped.tokens[mask], free.tokens[mask])


def test_a_mixture_is_that_of_its_logits(model, params, generate):
  other = models.init_params(model, jax.random.key(9))
  other = {**other, "unembedding": other["unembedding"] * 5}
  found = generate(mixture=({"params": other}, 0.3), slots=7, temperature=0.8)
  forward = jax.jit(lambda p: model.apply({"params": p}, found.tokens))
  logits = (0.7 * np.asarray(forward(params)) + 0.3 * np.asarray(forward(other))) / 0.8
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = np.take_along_axis(logprobs[:, :-1], found.tokens[:, 1:, None], -1)[..., 0]
  mask = found.response_mask[:, 1:]
  np.testing.assert_allclose(found.logprobs[:, 1:][mask], expected[mask], atol=1e-4)


def test_the_ends_of_a_mixture_are_its_parts(model, generate, samples):
  other = models.init_params(model, jax.random.key(9))
  assert_same(generate(mixture=({"params": other}, 0.0), slots=7), samples)
  end = generate(mixture=({"params": other}, 1.0), slots=7)
  assert not np.array_equal(end.tokens, samples.tokens)


def test_a_penalty_knows_prompt_and_response(model, params, generate):
  """Greedy rows against full forwards and Hugging Face's rule written out."""
  found = generate(temperature=0, repetition_penalty=1.8)
  logits = np.asarray(jax.jit(model.apply)({"params": params}, found.tokens))
  moved = 0  # tokens that would have been others
  for row, (start, count) in enumerate(zip(found.prompt_lengths, found.lengths)):
    for t in range(start, start + count):
      scores = logits[row, t - 1].astype(np.float64)
      moved += scores.argmax() != found.tokens[row, t]
      held = np.unique(found.tokens[row, :t])
      scores[held] = np.where(scores[held] > 0, scores[held] / 1.8, scores[held] * 1.8)
      assert found.tokens[row, t] == scores.argmax()
      expected = scores.max() - np.log(np.exp(scores).sum())
      np.testing.assert_allclose(found.logprobs[row, t], expected, atol=1e-4)
  assert moved > 0


def test_eight_devices_draw_the_same(generate, samples):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4), jax.devices())
  assert_same(generate(mesh=mesh, slots=8), samples)


def test_compilations_are_bounded(model, params):
  """Many lengths, counts and settings: as many programs as `generate` promises, and then none."""
  rng = np.random.default_rng(1)
  run = lambda count, temperature: sampling.generate(  # noqa: E731
    model, params, [*(rng.integers(2, VOCAB, rng.integers(1, 32)) for _ in range(count)),
                    np.full(32, 5)],
    max_new_tokens=[*rng.integers(1, 96, count), 96], eos_ids=[EOS], pad_id=PAD,
    rng=jax.random.key(count), slots=4, temperature=temperature,
  )  # fmt: skip
  programs = decode.prefill, decode.decode_on("cpu"), decode.admit, decode.resize
  before = [p._cache_size() for p in programs]
  for count, temperature in zip((5, 20), (0.5, 1.5)):
    run(count, temperature)
  new = [p._cache_size() - b for p, b in zip(programs, before)]
  w, s = len(scheduler.prompt_widths(32)), len(scheduler.cache_sizes(32 + 96))
  assert (w, s) == (2, 2) and w <= 1 + math.log2(32 / 16) and s <= 1 + math.log2(128 / 64)
  assert all(n <= bound for n, bound in zip(new, (w, s, w * s, s * s))), new
  before = [p._cache_size() for p in programs]
  run(20, 0.7)
  assert [p._cache_size() for p in programs] == before


@pytest.mark.parametrize("size", [5, 64, 127, 128, 200, 1000])
def test_cache_sizes_are_few_and_end_at_the_size(size):
  sizes = scheduler.cache_sizes(size)
  assert sizes[-1] == size and sizes == sorted(sizes)
  assert len(sizes) <= 1 + math.log2(max(size, 64) / 64)


@pytest.mark.parametrize("width", [16, 32, 48, 1008])
def test_prompt_widths_end_at_the_width(width):
  widths = scheduler.prompt_widths(width)
  assert widths[0] == 16 and widths[-1] == width and len(set(widths)) == len(widths)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"slots": 0}, "slots must be at least 1"),
    ({"slots": 4, "batch_size": 6}, "give one"),
    ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1"),
    ({"batch_size": 2}, "batch_size must be at least 3"),
    ({"max_new_tokens": [3, 0, *[2] * 7]}, "max_new_tokens must be at least 1"),
    ({"max_new_tokens": [3, 4]}, "one integer or one a prompt"),
    ({"stop": ["a"]}, "need the tokenizer"),
    ({"stop": "a", "tokenizer": Letters()}, "must be a list"),
    ({"stop": [""], "tokenizer": Letters()}, "not empty"),
    ({"mixture": ({}, 1.5)}, "weight of a mixture"),
  ],
)
def test_wrong_settings_are_refused(generate, options, message):
  with pytest.raises(InputError, match=message):
    generate(**options)
