"""A tiny language whose words are numbers, a reward that likes one of them, and its engine."""

import dataclasses
import types

import jax
import numpy as np
import optax
import pytest

from align_jax import models, rl, sharding

EOS, PAD, LIKED, VOCAB = 1, 0, 7, 16


class Tokenizer:
  """Numbers for words; the EOS is a special token."""

  pad_token_id = PAD
  eos_token_id = EOS

  def decode(self, ids, skip_special_tokens):
    return " ".join(str(i) for i in ids if not (skip_special_tokens and i == EOS))


def count_liked(prompts, texts):
  return np.array([text.split().count(str(LIKED)) for text in texts])


def prompt_batches(count: int, rows: int, seed: int = 0):
  rng = np.random.default_rng(seed)
  lengths = rng.integers(2, 7, (count, rows)).astype(np.int32)
  tokens = rng.integers(2, VOCAB, (count, rows, 8)).astype(np.int32)
  return [
    {
      "tokens": np.where(np.arange(8) < n[:, None], t, PAD),
      "lengths": n,
      "index": np.zeros(rows, int),
    }
    for t, n in zip(tokens, lengths)
  ]


@pytest.fixture(scope="session")
def toy():
  """model, params, value, mesh, tx; `iteration(config, ...)` and `state(config)` around them."""
  config = models.ModelConfig(
    vocab_size=VOCAB, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_dim=64
  )  # fmt: skip
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  model = models.Transformer(config)
  params = jax.jit(lambda: models.init_params(model, jax.random.key(0)))()
  params = jax.device_put(params, sharding.replicated(mesh))
  head = models.init_scalar_head(jax.random.key(1), config.embed_dim)
  value = {"trunk": params, "head": jax.device_put(head, sharding.replicated(mesh))}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
  liked = rl.text_reward("liked", count_liked)

  def iteration(settings, sampling, *, model=model, mesh=mesh, tx=tx, reward=liked, accumulate=1,
                shaping=rl.ShapingConfig()):  # fmt: skip  # noqa: B008
    draw = rl.policy_draw(
      model, sampling, prompts=["a prompt"], tokenizer=Tokenizer(), eos_ids=[EOS], mesh=mesh
    )
    learner = rl.policy_gradient_learner(
      model, settings, sampling=sampling, tx=tx, accumulate=accumulate,
      value_model=model if settings.value else None,
    )  # fmt: skip
    return rl.make_iteration(
      draw, learner, rewards=[reward], shaping=shaping, sampling=sampling, mesh=mesh,
      extra_draws=settings.extra_draws,
      layouts=rl.make_layouts(settings, sampling, accumulate=accumulate, mesh=mesh),
    )  # fmt: skip

  def state(settings, *, tx=tx, seed=0):
    trainable = {"policy": params} | ({"value": value} if settings.value else {})
    return rl.create_state(trainable, tx, kl_coef=settings.kl.coef, seed=seed, mesh=mesh)

  return types.SimpleNamespace(
    model=model, params=params, value=value, mesh=mesh, tx=tx, iteration=iteration, state=state
  )


PPO = rl.PolicyGradientConfig(
  estimator="gae",
  gamma=1.0,
  value=rl.ValueConfig(),
  kl=rl.KlConfig(0.02, target=3.0, horizon=2000.0),
  epochs=2,
  minibatches=2,
  whiten_advantages=True,
)
SAMPLING = rl.SamplingConfig(max_new_tokens=8)


def grouped(estimator: str, **settings):
  """A configuration of an estimator without a critic."""
  return dataclasses.replace(PPO, **{"estimator": estimator, "gamma": None, "value": None,
    "whiten_advantages": False, "kl": rl.KlConfig(0.02)} | settings)  # fmt: skip
