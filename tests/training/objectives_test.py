"""Objectives: step-0 identities, rewards read by position, settings that cannot be ignored."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax import data, models, worlds
from align_jax.errors import InputError
from align_jax.training import (
  objectives,
  preference_objectives,
  preferences,
  reward_objectives,
)
from align_jax.training.metrics import to_floats

KEY = jax.random.key(0)
response_scores = jax.jit(objectives.response_scores, static_argnums=0)


def feedback_of(pairs):
  """The pair batch as a feedback batch; the mismatched response is the next row's."""
  flat = {k: pairs[k].reshape(16, 16) for k in ("tokens", "segment_ids", "response_mask")}
  other = {f"mismatched_{k}": np.roll(v, 2, axis=0) for k, v in flat.items()}
  ones = {
    "is_desirable": np.tile([1.0, 0.0], 8).astype(np.float32),
    "weight": np.ones(16, np.float32),
  }
  return flat | other | ones


def preference(model, name, chunk=None, **settings):
  config = preferences.PreferenceConfig(name, **settings)
  return jax.jit(preference_objectives.preference_objective(model, config, chunk=chunk))


def dpo(model, **settings):
  return preference(model, "dpo", **settings)


def kto_prepare(model):
  return preference_objectives.prepare(model, preferences.PreferenceConfig("kto"))


@pytest.mark.parametrize(
  "name, settings, loss",
  [
    ("dpo", {"beta": 0.3}, np.log(2.0)),
    ("dpo", {"label_smoothing": 0.2}, np.log(2.0)),
    ("ipo", {"tau": 0.1}, 25.0),
    ("kto", {}, 0.5),
  ],
)
def test_step_zero_identities(tiny_model, tiny_pairs, name, settings, loss):
  """peers 3.11, 3.12: policy = reference."""
  model, params = tiny_model
  batch = tiny_pairs
  if name == "kto":
    batch = kto_prepare(model)(params, {"ref": params}, feedback_of(tiny_pairs))
  _, metrics = preference(model, name, **settings)(params, {"ref": params}, batch, KEY)
  values = to_floats(metrics)
  np.testing.assert_allclose(values["loss"], loss, rtol=1e-6)
  assert values["rewards/chosen"] == values["rewards/rejected"] == 0.0


def test_lora_at_birth_is_its_own_reference(tiny_model, tiny_pairs):
  model, params = tiny_model
  adapter = models.init_lora(KEY, model, rank=2, targets=("query", "down"))
  loss, metrics = dpo(model)(adapter, {"base": params}, tiny_pairs, KEY)
  np.testing.assert_allclose(to_floats(metrics)["loss"], np.log(2.0), rtol=1e-6)
  grads, _ = jax.jit(jax.grad(dpo(model), has_aux=True))(adapter, {"base": params}, tiny_pairs, KEY)
  assert jax.tree.structure(grads) == jax.tree.structure(adapter)
  assert all(jnp.any(g["b"] != 0) for g in grads["layers"].values())  # it can leave ln 2


def test_beta_is_applied_once(tiny_model, tiny_pairs):
  """peers 3.10: against the formula in NumPy, with the log-probs of another code path."""
  model, params = tiny_model
  ref = jax.tree.map(lambda x: 0.9 * x, params)

  def logps(p):
    tokens = tiny_pairs["tokens"].reshape(16, 16)
    segments = tiny_pairs["segment_ids"].reshape(16, 16)
    logits = jax.jit(model.apply)({"params": p}, tokens, segment_ids=segments)
    scores = np.asarray(jax.nn.log_softmax(logits))
    mask = tiny_pairs["response_mask"].reshape(16, 16)
    return np.array(
      [sum(scores[b, t - 1, tokens[b, t]] for t in range(1, 16) if mask[b, t]) for b in range(16)]
    ).reshape(8, 2)

  ratio = logps(params) - logps(ref)
  expected = np.log1p(np.exp(-0.5 * (ratio[:, 0] - ratio[:, 1]))).mean()
  _, metrics = dpo(model, beta=0.5)(params, {"ref": ref}, tiny_pairs, KEY)
  values = to_floats(metrics)
  np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
  np.testing.assert_allclose(
    values["rewards/margin"], 0.5 * (ratio[:, 0] - ratio[:, 1]).mean(), rtol=1e-4, atol=2e-6
  )


def test_chunked_head_changes_nothing(tiny_model, tiny_pairs):
  model, params = tiny_model
  ref = jax.tree.map(lambda x: 0.9 * x, params)
  whole, _ = dpo(model)(params, {"ref": ref}, tiny_pairs, KEY)
  parts, _ = dpo(model, chunk=4)(params, {"ref": ref}, tiny_pairs, KEY)
  np.testing.assert_allclose(whole, parts, rtol=1e-6)


def test_kto_baseline_is_that_of_the_whole_batch(tiny_model, tiny_pairs):
  """peers 3.31: accumulation splits the batch after its baseline is known."""
  model, params = tiny_model
  ref = jax.tree.map(lambda x: 0.9 * x, params)
  batch = feedback_of(tiny_pairs)
  prepared = kto_prepare(model)(params, {"ref": ref}, batch)
  objective = preference(model, "kto")
  whole = to_floats(objective(params, {"ref": ref}, prepared, KEY)[1])
  halves = [
    objective(params, {"ref": ref}, jax.tree.map(lambda x, s=s: x[s::2], prepared), KEY)[1]
    for s in (0, 1)
  ]
  merged = to_floats(jax.tree.map(jnp.add, *halves))
  np.testing.assert_allclose(merged["loss"], whole["loss"], rtol=1e-6)
  assert len(set(np.asarray(prepared["kl_baseline"]).tolist())) == 1


def test_score_is_read_at_the_last_response_token(tiny_model):
  """peers 3.3, 3.24, 3.29: right whatever the pad id (here also the EOS id) and amount of padding."""
  model, params = tiny_model
  head = models.init_scalar_head(KEY, 32)
  tokens = np.array([[5, 6, 7, 2, 2, 2], [5, 6, 7, 8, 9, 2]], np.int32)  # EOS = pad = 2
  segments = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], np.int32)
  mask = np.array([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], np.float32)
  variables = {"params": params}
  scores = response_scores(model, variables, head, tokens, segments, mask)
  hidden = jax.jit(functools.partial(model.apply, method="hidden"))(variables, tokens)
  all_scores = models.scalar_head(head, hidden)
  np.testing.assert_allclose(scores, [all_scores[0, 3], all_scores[1, 5]], rtol=1e-5)
  padded = [
    np.pad(x, ((0, 0), (0, 7)), constant_values=v)
    for x, v in ((tokens, 2), (segments, 0), (mask, 0))
  ]
  wide = response_scores(model, variables, head, *padded)
  np.testing.assert_allclose(wide, scores, rtol=1e-5)
  alone = response_scores(model, variables, head, tokens[:1], segments[:1], mask[:1])
  np.testing.assert_allclose(alone, scores[:1], rtol=1e-5)  # peers 3.30: no dependence on the batch


def test_empty_response_is_finite(tiny_model, tiny_pairs):
  """peers 3.15, 3.27: no response token at all."""
  model, params = tiny_model
  empty = dict(tiny_pairs, response_mask=tiny_pairs["response_mask"].copy())
  empty["response_mask"][0] = 0
  loss, _ = dpo(model)(params, {"ref": params}, empty, KEY)
  np.testing.assert_allclose(loss, 8 * np.log(2.0), rtol=1e-6)
  reward = jax.jit(reward_objectives.pair_objective(model))
  head = {"trunk": params, "head": models.init_scalar_head(KEY, 32)}
  assert np.isfinite(reward(head, {}, empty, KEY)[0])


def test_prompt_and_padding_content_is_not_learned_from(tiny_model, tiny_pairs):
  """Tokens behind a row's end change nothing; the loss has no gradient on prompt log-probs."""
  model, params = tiny_model
  ref = jax.tree.map(lambda x: 0.9 * x, params)
  noisy = dict(tiny_pairs, tokens=np.where(tiny_pairs["segment_ids"] > 0, tiny_pairs["tokens"], 63))
  a, _ = dpo(model)(params, {"ref": ref}, tiny_pairs, KEY)
  b, _ = dpo(model)(params, {"ref": ref}, noisy, KEY)
  np.testing.assert_allclose(a, b, rtol=1e-6)


def test_reward_loss_is_bradley_terry_with_centring(tiny_model, tiny_pairs):
  model, params = tiny_model
  trainable = {"trunk": params, "head": models.init_scalar_head(KEY, 32)}
  _, metrics = reward_objectives.pair_objective(model, reward_objectives.PairLoss(centering=0.5))(
    trainable, {}, tiny_pairs, KEY
  )
  flat = {k: tiny_pairs[k].reshape(16, 16) for k in ("tokens", "segment_ids", "response_mask")}
  r = response_scores(model, {"params": params}, trainable["head"], **flat).reshape(8, 2)
  expected = np.log1p(np.exp(r[:, 1] - r[:, 0])) + 0.5 * (r[:, 0] + r[:, 1]) ** 2
  np.testing.assert_allclose(to_floats(metrics)["loss"], np.mean(expected), rtol=1e-5)


@pytest.mark.parametrize(
  "settings, message",
  [
    ({"name": "dop"}, "objective.name must be one of dpo, cdpo, .*, not 'dop'"),
    ({"name": "ipo", "beta": 0.1}, "objective.beta is not used by the objective 'ipo'"),
    ({"name": "dpo", "tau": 0.1}, "objective.tau is not used by the objective 'dpo'"),
  ],
)
def test_no_setting_is_ignored(settings, message):
  """peers 3.16."""
  with pytest.raises(InputError, match=message):
    preferences.PreferenceConfig(**settings)


def test_sft_loss_ignores_prompt_padding_and_segment_starts(tiny_model):
  model, params = tiny_model
  rng = np.random.default_rng(0)
  a, b = rng.integers(1, 64, 6), rng.integers(1, 64, 5)
  mask_a, mask_b = (
    np.array([0, 0, 1, 1, 1, 1]),
    np.array([1, 0, 1, 1, 1]),
  )  # 1 at b's start: no one predicts it

  def rows(*parts):
    """Each part a list of (tokens, mask) packed into one row of 12."""
    out = {k: np.zeros((len(parts), 12), np.int32) for k in ("tokens", "segment_ids", "positions")}
    out["loss_mask"] = np.zeros((len(parts), 12), np.float32)
    for r, part in enumerate(parts):
      at = 0
      for s, (tokens, mask) in enumerate(part, start=1):
        here = slice(at, at + len(tokens))
        out["tokens"][r, here], out["segment_ids"][r, here] = tokens, s
        out["positions"][r, here], out["loss_mask"][r, here] = np.arange(len(tokens)), mask
        at += len(tokens)
    return out

  objective = jax.jit(objectives.sft_objective(model))
  packed = objective(params, {}, rows([(a, mask_a), (b, mask_b)]), KEY)[1]["loss"]
  separate = objective(params, {}, rows([(a, mask_a)], [(b, mask_b)]), KEY)[1]["loss"]
  np.testing.assert_allclose(packed.total, separate.total, rtol=1e-5)
  assert packed.weight == separate.weight == 4 + 3


def padded(batch, before, behind):
  """The batch with more padding on both sides, and noise wherever there is padding."""
  sides = [(0, 0), (0, 0), (before, behind)]
  wide = {k: np.pad(v, sides) if v.ndim == 3 else v for k, v in batch.items()}
  noise = np.random.default_rng(before).integers(0, 64, wide["tokens"].shape)
  wide["tokens"] = np.where(wide["segment_ids"] > 0, wide["tokens"], noise).astype(np.int32)
  return wide


def test_padding_side_amount_and_content_change_nothing(tiny_model, tiny_pairs):
  """peers 3.17, 3.29: padding in front, behind and both, filled with any tokens."""
  model, params = tiny_model
  head = models.init_scalar_head(KEY, 32)
  cases = [
    (dpo(model), params, {"ref": jax.tree.map(lambda x: 0.9 * x, params)}),
    (reward_objectives.pair_objective(model), {"trunk": params, "head": head}, {}),
  ]
  for objective, trainable, frozen in cases:
    run = jax.jit(objective)
    expected = to_floats(run(trainable, frozen, tiny_pairs, KEY)[1])
    for before, behind in ((0, 7), (7, 0), (3, 4)):
      values = to_floats(run(trainable, frozen, padded(tiny_pairs, before, behind), KEY)[1])
      for name, value in values.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_the_random_stream_changes_nothing(tiny_model, tiny_pairs):
  """peers 3.13: no layer drops anything out and no setting asks for it, in policy or reference.

  So there is no train mode to leave on; what an objective could do with its key would show here.
  """
  model, params = tiny_model
  ref = jax.tree.map(lambda x: 0.9 * x, params)
  run = dpo(model)
  first, second = (run(params, {"ref": ref}, tiny_pairs, jax.random.key(k))[0] for k in (1, 2))
  assert first == second


def test_half_precision_does_not_part_policy_and_reference(tiny_model, tiny_pairs):
  """peers 3.14: one module computes both, so rounding meets both alike, also while differentiated."""
  model, params = tiny_model
  half = model.clone(config=dataclasses.replace(model.config, dtype="bfloat16"))
  run = jax.jit(jax.value_and_grad(dpo(half), has_aux=True))
  (_, metrics), _ = run(params, {"ref": params}, tiny_pairs, KEY)
  values = to_floats(metrics)
  np.testing.assert_allclose(values["loss"], np.log(2.0), rtol=1e-6)
  assert values["rewards/chosen"] == values["rewards/rejected"] == 0.0


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto", "reward"])
def test_empty_rows_leave_every_gradient_finite(tiny_model, tiny_pairs, name):
  """peers 3.15, 3.27: one response empty, both empty, and a row that is nothing but padding."""
  model, params = tiny_model
  batch = {k: v.copy() for k, v in tiny_pairs.items()}
  batch["response_mask"][0, 1] = batch["response_mask"][1] = batch["response_mask"][2] = 0
  batch["segment_ids"][2] = 0
  trainable, frozen = params, {"ref": jax.tree.map(lambda x: 0.9 * x, params)}
  if name == "reward":
    trainable = {"trunk": params, "head": models.init_scalar_head(KEY, 32)}
    frozen, objective = {}, reward_objectives.pair_objective(model)
  else:
    objective = preference_objectives.preference_objective(
      model, preferences.PreferenceConfig(name)
    )
  if name == "kto":
    batch = kto_prepare(model)(params, frozen, feedback_of(batch))
  loss, gradient = jax.jit(jax.value_and_grad(lambda t: objective(t, frozen, batch, KEY)[0]))(
    trainable
  )
  assert np.isfinite(loss)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
  assert any(np.any(g) for g in jax.tree.leaves(gradient))


@pytest.fixture(scope="module")
def packing():
  """(model, params, {packed or not: one batch}) of thirty microworld demonstrations."""
  world = worlds.Microworld(seed=0)
  tokenizer = world.tokenizer()
  records = world.demonstrations(30, "train", seed=0)
  records = [dataclasses.replace(r, weight=1.0 + i % 3) for i, r in enumerate(records)]
  batches = {}
  for pack in (True, False):
    batches[pack], *rest = data.sft_batches(
      records, tokenizer, length=64, batch_size=30, epochs=1, pack=pack, pad_last=True
    )
    assert not rest
  config = models.ModelConfig(
    vocab_size=len(tokenizer), embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
    head_dim=8, mlp_dim=32,
  )  # fmt: skip
  model = models.Transformer(config)
  return model, jax.jit(functools.partial(models.init_params, model))(KEY), batches


def test_packed_loss_and_gradient_are_the_unpacked_ones(packing):
  """peers 3.6, 3.44: the way from records to gradient, with weights and masks on it."""
  model, params, batches = packing
  assert batches[True]["segment_ids"].max() > 1 == batches[False]["segment_ids"].max()
  run = jax.jit(jax.value_and_grad(objectives.sft_objective(model), has_aux=True))
  results = [run(params, {}, batches[pack], KEY) for pack in (True, False)]
  (packed, metrics), (separate, expected) = (values for values, _ in results)
  np.testing.assert_allclose(packed, separate, rtol=1e-5)
  assert float(metrics["loss"].weight) == float(expected["loss"].weight) > 100
  assert metrics["tokens"] == expected["tokens"]
  for a, b in zip(*(jax.tree.leaves(gradient) for _, gradient in results)):
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def test_a_neighbour_in_the_row_is_never_seen(packing):
  """peers 3.44: other words in the first segment move no log-prob of the segments after it."""
  model, params, batches = packing
  batch = batches[True]
  segments = batch["segment_ids"]
  noise = np.random.default_rng(0).integers(0, model.config.vocab_size, segments.shape)
  changed = np.where(segments == 1, noise, batch["tokens"]).astype(np.int32)
  run = jax.jit(
    lambda tokens: models.token_logprobs(
      model, {"params": params}, tokens, positions=batch["positions"], segment_ids=segments
    )
  )
  before, after = run(batch["tokens"]), run(changed)
  inside = segments[:, 1:] == segments[:, :-1]
  others = inside & (segments[:, 1:] > 1)
  assert others.sum() > 100
  np.testing.assert_array_equal(before[others], after[others])
  first = inside & (segments[:, 1:] == 1)
  assert np.mean(before[first] != after[first]) > 0.9  # the control


def test_only_response_tokens_are_predicted(packing):
  """peers 3.1, 3.5: prompts are context and never targets; the sum is written out in NumPy."""
  model, params, batches = packing
  batch = batches[False]
  logits = jax.jit(model.apply)(
    {"params": params}, batch["tokens"], batch["positions"], batch["segment_ids"]
  )
  logprobs = np.asarray(jax.nn.log_softmax(logits))
  expected = 0.0
  for row, t in np.argwhere(batch["loss_mask"] > 0):
    expected -= batch["loss_mask"][row, t] * logprobs[row, t - 1, batch["tokens"][row, t]]
  loss, _ = jax.jit(objectives.sft_objective(model))(params, {}, batch, KEY)
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_reward_model_reads_both_layouts_alike(packing, soft):
  """At the last response token of each answer, wherever its row holds it; margins, labels and all."""
  model, params, _ = packing
  trainable = {"trunk": params, "head": models.init_scalar_head(KEY, 16)}
  objective = reward_objectives.pair_objective(
    model, reward_objectives.PairLoss(centering=0.1, label_smoothing=0.05)
  )
  run = jax.jit(jax.value_and_grad(objective, has_aux=True))
  (loss, metrics), gradient = run(trainable, {}, soft.padded, KEY)
  (other, others), other_gradient = run(trainable, {}, soft.shared, KEY)
  np.testing.assert_allclose(other, loss, rtol=1e-5)
  values, other_values = to_floats(metrics), to_floats(others)
  assert other_values.pop("tokens") < values.pop("tokens")  # prompts are held once
  np.testing.assert_allclose(list(other_values.values()), list(values.values()), rtol=1e-4)
  for a, b in zip(jax.tree.leaves(other_gradient), jax.tree.leaves(gradient)):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
  moved = dict(soft.shared, last=np.maximum(soft.shared["last"] - 1, 0))  # the control
  assert abs(run(trainable, {}, moved, KEY)[0][0] - loss) > 1e-3
