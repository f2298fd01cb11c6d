"""Tests of rollouts: what is sampled, and which number belongs to which token."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from align_jax import models
from align_jax.rl import rollouts
from align_jax.rl.config import SamplingConfig

TEMPERATURE = 0.8


class Tokenizer:
  """Pads with the EOS, as many real tokenizers must."""

  pad_token_id = 1
  eos_token_id = 1

  def decode(self, ids, skip_special_tokens):
    return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def rollout(tiny_model):
  model, params = tiny_model
  batch = {
    "tokens": np.array([[5, 6, 7, 1], [5, 6, 7, 1], [9, 1, 1, 1], [8, 3, 1, 4]], np.int32),
    "lengths": np.array([3, 3, 1, 4], np.int32),
    "index": np.array([2, 2, 0, 1]),
  }
  return rollouts.sample_rollout(
    model, {"params": params}, batch, ["zero", "one", "two"], Tokenizer(),
    rng=jax.random.key(0), sampling=SamplingConfig(6, TEMPERATURE), eos_ids=[1, 2, 3, 4],
  )  # fmt: skip


@pytest.fixture(scope="module")
def scored(tiny_model, rollout):
  model, params = tiny_model
  value = {"trunk": params, "head": {"kernel": np.linspace(-1, 1, 32), "bias": 0.5}}
  score = functools.partial(
    rollouts.score_rollout, model, model, temperature=TEMPERATURE, chunk=None
  )
  other = jax.tree.map(lambda x: x * 1.1, params)
  trainable, frozen = {"policy": params, "value": value}, {"ref": other}
  return jax.device_get(jax.jit(score)(trainable, frozen, rollout.batch())), frozen, value


@pytest.fixture(scope="module")
def forward(tiny_model):
  """Hidden states and tempered log-probs of one unpadded row."""
  model, _ = tiny_model

  @jax.jit
  def run(params, row):
    hidden = model.apply({"params": params}, row[None], method="hidden")
    logits = model.apply({"params": params}, hidden, method=models.Transformer.unembed)
    return hidden[0], jax.nn.log_softmax(logits[0] / TEMPERATURE)

  return run


def test_rows_are_the_prompts_in_their_order(rollout):
  assert rollout.prompts == ["two", "two", "zero", "one"]
  np.testing.assert_array_equal(rollout.tokens[3, :4], [8, 3, 1, 4])
  assert len(rollout.texts) == 4


def test_a_prompt_drawn_twice_is_answered_twice(rollout):
  assert rollout.texts[0] != rollout.texts[1]


def test_segments_and_masks_go_by_length_though_the_padding_is_an_eos(rollout):
  ends = rollout.samples.prompt_lengths + rollout.samples.lengths
  np.testing.assert_array_equal(rollout.segment_ids.sum(axis=1), ends)
  batch = rollout.batch()
  assert batch["mask"].shape == batch["sampler_logprobs"].shape == (4, rollout.tokens.shape[1] - 1)
  for row in range(4):
    start = rollout.samples.prompt_lengths[row] - 1
    np.testing.assert_array_equal(
      np.flatnonzero(batch["mask"][row]), np.arange(start, ends[row] - 1)
    )


def test_the_trainers_logprobs_are_the_samplers(scored):
  batch, _, _ = scored
  np.testing.assert_allclose(batch["old_logprobs"], batch["sampler_logprobs"], atol=1e-4)


def test_every_number_belongs_to_its_token(tiny_model, rollout, scored, forward):
  batch, frozen, value = scored
  for row in range(4):
    end = rollout.samples.prompt_lengths[row] + rollout.samples.lengths[row]
    tokens = np.full(32, 0)
    tokens[:end] = rollout.tokens[row, :end]
    hidden, logprobs = forward(tiny_model[1], tokens)
    _, ref_logprobs = forward(frozen["ref"], tokens)
    for t in np.flatnonzero(rollout.response_mask[row]):
      token = rollout.tokens[row, t]
      expected_value = hidden[t - 1] @ value["head"]["kernel"] + 0.5  # before the token is known
      entropy = -np.sum(np.exp(logprobs[t - 1]) * logprobs[t - 1])
      for name, expected in (
        ("old_logprobs", logprobs[t - 1, token]),
        ("ref_logprobs", ref_logprobs[t - 1, token]),
        ("old_values", expected_value),
        ("entropy", entropy),
      ):
        np.testing.assert_allclose(batch[name][row, t - 1], expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_there_off_the_mask(scored):
  batch = scored[0]
  for name in ("old_logprobs", "ref_logprobs", "old_values", "entropy"):
    np.testing.assert_array_equal(batch[name][batch["mask"] == 0], 0.0)


class TestWidth:
  """Learning leaves out the columns that are padding in every row."""

  @pytest.mark.parametrize(
    "longest, width, expected",
    [
      (1, 100, 100),
      (90, 128, 128),
      (129, 200, 200),
      (1, 2048, 256),
      (256, 2048, 256),
      (257, 2048, 512),
      (1100, 1100, 1100),
    ],
  )
  def test_it_is_the_next_step(self, longest, width, expected):
    assert rollouts.learned_width(longest, width) == expected

  def test_there_are_eight_at_most(self):
    for width in (128, 600, 1024, 1025, 5000):
      found = {rollouts.learned_width(longest, width) for longest in range(1, width + 1)}
      assert len(found) <= 8 and max(found) == width

  def test_no_number_depends_on_what_was_cut(self, tiny_model, rollout):
    """Of rows that are 300 wide and 10 long, against the same rows as they were sampled."""
    model, params = tiny_model
    samples = rollout.samples
    wide = [np.pad(x, [(0, 0), (0, 300 - x.shape[1])], constant_values=c) for x, c in (
      (samples.tokens, 1), (samples.response_mask, False), (samples.logprobs, 0.0),
    )]  # fmt: skip
    padded = dataclasses.replace(
      rollout,
      samples=dataclasses.replace(samples, tokens=wide[0], response_mask=wide[1], logprobs=wide[2]),
    ).batch()
    assert padded["tokens"].shape == (4, 128) and padded["mask"].shape == (4, 127)
    score = lambda rows: rollouts.policy_logprobs(  # noqa: E731
      model, {"params": params}, rows, temperature=TEMPERATURE, chunk=None
    )[0]
    whole = rollout.batch()
    end = whole["mask"].shape[1]
    for name in ("mask", "sampler_logprobs"):
      np.testing.assert_array_equal(padded[name][:, :end], whole[name])
      assert not padded[name][:, end:].any()
    found = score(padded)[:, :end] * whole["mask"]
    np.testing.assert_allclose(found, score(whole) * whole["mask"], atol=1e-5)
