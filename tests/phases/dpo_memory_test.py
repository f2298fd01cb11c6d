"""The compiled DPO step holds no float32 array as large as the logits of its batch.

What is read is the program that the compiler has made, every instruction of it, those inside fusions
excepted, which are never written to memory. That the tests' compiler is told not to optimise changes what
an instruction becomes, not which there are: the arrays are those of a run's own compiler.
"""

import dataclasses
import math

import jax
import pytest

from align_jax import data, models, sharding, worlds
from align_jax.scale import hlo
from align_jax.training import optimizer, preference_objectives, preferences, state, step

BATCH, LENGTH, CHUNK = 8, 46, 8
VOCAB = 509  # a prime, so that no other size is mistaken for it


@pytest.fixture(scope="module")
def pairs():
  world = worlds.Microworld(seed=0)
  plan = data.Batching(BATCH, epochs=1)
  return data.tokenise_pairs(world.preferences(BATCH), world.tokenizer(), plan, length=LENGTH)


def largest_with_vocabulary(tiny, batch, chunk: int | None) -> int:
  """Elements of the largest float32 array with a dimension of the vocabulary; the weights are small."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  config = dataclasses.replace(tiny.config, vocab_size=VOCAB)
  model = models.Transformer(config, mesh=mesh)
  params = jax.jit(lambda key: models.init_params(model, key))(jax.random.key(0))
  params = jax.device_put(params, sharding.replicated(mesh))
  tx = optimizer.make_optimizer(optimizer.OptimizerConfig(1e-5), 10)
  objective = preference_objectives.preference_objective(
    model, preferences.PreferenceConfig("dpo"), chunk=chunk
  )
  start = state.create_state(params, tx, 0, mesh)
  train_step = step.make_train_step(objective, tx)
  lowered = train_step.lower(start, {"ref": params}, sharding.put_batch(batch, mesh))
  module = hlo.parse(lowered.compile().as_text())
  arrays = {a for name in module.runs for i in module.computations[name] for a in i.arrays}
  return max(
    math.prod(a.shape) for a in arrays if a.dtype == "f32" and a.shape and VOCAB in a.shape
  )


def test_the_shared_layout_in_chunks_holds_no_logits(tiny_model, pairs):
  batch = next(data.shared_batches(pairs))
  whole = batch["tokens"].size * VOCAB  # [B, T, V] of its own rows, fewer than those of two answers
  assert largest_with_vocabulary(tiny_model[0], batch, CHUNK) < whole / 2


def test_without_chunks_the_padded_layout_does(tiny_model, pairs):
  """The control: this way of looking finds them where they are."""
  batch = next(data.padded_batches(pairs, LENGTH))
  whole = batch["tokens"][..., 1:].size * VOCAB
  assert largest_with_vocabulary(tiny_model[0], batch, None) >= whole
