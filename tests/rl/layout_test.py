"""Rollouts in shared rows: the same numbers as one response a row, in fewer token places."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import rl, sampling, sharding
from align_jax.errors import InputError
from align_jax.rl import rollouts
from align_jax.training import step
from tests.rl.conftest import PPO, VOCAB, grouped, prompt_batches

PROMPTS, RESPONSES = [5, 2, 7], [4, 1, 6, 3, 2, 5]  # two responses to a prompt
G2 = rl.SamplingConfig(max_new_tokens=6, samples_per_prompt=2)


def samples(prompts=PROMPTS, responses=RESPONSES):
  """Random tokens; padding is a token that also occurs, so that nothing can be found by it."""
  rng = np.random.default_rng(0)
  group = len(responses) // len(prompts)
  width = max(prompts) + max(responses)
  tokens = np.full((len(responses), width), 3, np.int32)
  mask = np.zeros(tokens.shape, bool)
  starts = [rng.integers(2, VOCAB, n) for n in prompts]
  for row, size in enumerate(responses):
    prompt = starts[row // group]
    tokens[row, : len(prompt)] = prompt
    tokens[row, len(prompt) : len(prompt) + size] = rng.integers(2, VOCAB, size)
    mask[row, len(prompt) : len(prompt) + size] = True
  lengths = np.repeat(prompts, group).astype(np.int32)
  zeros = np.zeros(tokens.shape, np.float32)
  return sampling.Samples(tokens, lengths, mask, zeros, np.ones(len(responses), bool))


def laid_out(toy, length, *, config=None, mesh=None, accumulate=1, settings=G2, given=None):
  config = dataclasses.replace(
    config or grouped("rloo", epochs=1, minibatches=1), row_length=length
  )
  make = rl.make_layouts(config, settings, accumulate=accumulate, mesh=mesh or toy.mesh)
  return jax.device_get(make(toy.state(config), given or samples()))


def scores(toy, rows):
  policy = {"params": toy.params}
  return rollouts.policy_logprobs(toy.model, policy, rows, temperature=0.7, chunk=4)


def padded_rows():
  return rl.Rollout((), (), samples()).batch(whole=True)


@pytest.mark.parametrize("length", [13, 24, 60])
def test_every_token_has_the_numbers_of_a_row_of_its_own(toy, length):
  rows = padded_rows()
  laid = rows | {"layout": laid_out(toy, length)["scoring"]}
  for own, shared in zip(scores(toy, rows), scores(toy, laid)):
    assert np.abs(own).sum() > 0
    np.testing.assert_allclose(shared, own, rtol=2e-5, atol=2e-6)
  values = [rollouts.token_values(toy.model, toy.value, {}, x) for x in (rows, laid)]
  own, shared = (np.asarray(x) * rows["mask"] for x in values)
  np.testing.assert_allclose(shared, own, rtol=2e-5, atol=2e-6)


def test_responses_that_saw_each_other_would_have_others(toy):
  layout = laid_out(toy, 60)["scoring"]
  layout["branch_ids"] = np.zeros_like(layout["branch_ids"])
  own, shared = (scores(toy, padded_rows() | x)[0] for x in ({}, {"layout": layout}))
  assert np.abs(own - shared).max() > 1e-2


def test_a_prompt_is_there_once_and_again_where_its_responses_need_rows_of_their_own(toy):
  once, apart = (laid_out(toy, length)["scoring"] for length in (60, 13))
  assert (once["segment_ids"] > 0).sum() == sum(PROMPTS) + sum(RESPONSES)
  again = sum(p for p, (a, b) in zip(PROMPTS, np.reshape(RESPONSES, (3, 2))) if p + a + b > 13)
  assert again == 7
  assert (apart["segment_ids"] > 0).sum() == sum(PROMPTS) + sum(RESPONSES) + again
  for layout in (once, apart):
    assert layout["scored"].sum() == (layout["back"] >= 0).sum() == sum(RESPONSES)


def test_a_row_that_is_too_short_is_refused(toy):
  with pytest.raises(InputError, match="row_length 11: the longest .* together have 12 tokens"):
    laid_out(toy, 11)


IN_LOSS = rl.KlConfig(0.1, place="loss", kind="k3")
METHODS = {
  "ppo": (PPO, rl.SamplingConfig(max_new_tokens=6)),
  "grpo": (grouped("grpo", average="sequence", epochs=2, minibatches=1, kl=IN_LOSS), G2),
  "gspo": (grouped("grpo", loss="gspo", average="sequence", epochs=1, minibatches=2), G2),
  "dynamic": (grouped("grpo", epochs=1, minibatches=2, extra_draws=1), G2),
}


def after(toy, config, settings, *, prompts, accumulate=1, mesh=None, iterations=2):
  iterate = toy.iteration(config, settings, accumulate=accumulate, mesh=mesh or toy.mesh)
  state, reference = toy.state(config), toy.params
  if mesh is not None:
    reference, state = jax.device_put((reference, state), sharding.replicated(mesh))
  for batch in prompts[:iterations]:
    state, metrics, _ = iterate(state, {"ref": reference}, batch)
  found = {k: v for k, v in metrics.items() if not k.startswith(("time/", "sampling/"))}
  return jax.device_get((state.params, found))


@pytest.mark.parametrize(
  "name, accumulate", [*((name, 1) for name in METHODS), ("ppo", 2), ("grpo", 2)]
)
def test_an_iteration_learns_the_same(toy, name, accumulate):
  config, settings = METHODS[name]
  prompts = prompt_batches(2, 8 * (config.extra_draws + 1))
  run = {"prompts": prompts, "accumulate": accumulate}
  padded = after(toy, config, settings, **run)
  shared = after(toy, dataclasses.replace(config, row_length=32), settings, **run)
  assert set(padded[1]) == set(shared[1])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), padded, shared)


def test_eight_devices_learn_what_one_does(toy):
  config, settings = dataclasses.replace(METHODS["grpo"][0], row_length=32), G2
  mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2), jax.devices())
  run = {"prompts": prompt_batches(1, 8), "accumulate": 2, "iterations": 1}
  one, eight = (after(toy, config, settings, mesh=m, **run) for m in (toy.mesh, mesh))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5), one, eight)


def test_parts_are_interleaved_rows_of_whole_layouts(toy):
  """What a step takes apart are the layouts of its parts, each with all that its responses need."""
  config = grouped("rloo", epochs=2, minibatches=1)
  found = laid_out(toy, 24, config=config, accumulate=2)
  assert found["order"].shape == (2, 6)
  for update, order in enumerate(found["order"]):
    layout = {name: x[update] for name, x in found["updates"].items()}
    parts = step.interleaved_parts(layout, 2)
    for part in range(2):
      numbers = order[part::2]
      back, targets = parts["back"][part], parts["targets"][part].reshape(-1)
      given = samples()
      for row, number in zip(back, numbers):
        np.testing.assert_array_equal(row >= 0, given.response_mask[number, 1:])
        np.testing.assert_array_equal(targets[row[row >= 0]], given.responses()[number])


def test_few_shapes_and_whole_shares_of_a_mesh(toy):
  mesh = sharding.make_mesh(sharding.MeshConfig(data=4, fsdp=2), jax.devices())
  many = samples([6] * 64, [5 + i % 3 for i in range(128)])
  one = laid_out(toy, 24, given=many)["scoring"]["tokens"].shape
  assert one == (64, 24)  # 64 prompts with two responses each, 16 to 19 tokens: one a row
  assert laid_out(toy, 24, given=many, mesh=mesh)["scoring"]["tokens"].shape[0] % 8 == 0


def test_padding_costs_more(toy):
  rows, layout = padded_rows(), laid_out(toy, 24)["scoring"]
  assert layout["tokens"].size < 0.8 * rows["tokens"].size
  assert jnp.asarray(layout["scored"]).max() == 1


@pytest.mark.parametrize("length", [0, 1])
def test_a_row_holds_something(length):
  with pytest.raises(InputError, match="row_length must be at least 2"):
    dataclasses.replace(PPO, row_length=length)
