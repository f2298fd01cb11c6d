"""Eight CPU devices, highest matmul precision, a persistent compilation cache; shared tiny models.

Most of the tests' time is compilation, of small programs that run for milliseconds: the compiler is told
not to make them fast.
"""

import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Threads that XLA may block in collectives. Eight devices that wait in two of them at once need more than
# the eight it takes by itself, or they wait for ever.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# jaxlib 0.10.2 can still do without MLIR, and then compiles in half the time.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_cpu_parallel_codegen_split_count=1"
  + " --xla_cpu_use_fusion_emitters=false" * (importlib.metadata.version("jaxlib") == "0.10.2"),
)
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/align_jax/compiled-tests")
)

import jax
import numpy as np
import pytest

from align_jax import app

app.set_environment()  # as the commands do that tests start: what one compiles the other finds
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
  """The public data of the environment variable ALIGN_JAX_DATA; skips without it."""
  folder = os.environ.get("ALIGN_JAX_DATA")
  if not folder:
    pytest.skip("ALIGN_JAX_DATA is not set: the public data files are not at hand")
  return pathlib.Path(folder)


@pytest.fixture(scope="session")
def tiny_model():
  """(model, params): two layers, grouped heads, a vocabulary of 64."""
  from align_jax import models

  config = models.ModelConfig(
    vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=64
  )
  model = models.Transformer(config)
  return model, jax.jit(lambda key: models.init_params(model, key))(jax.random.key(0))


@pytest.fixture(scope="session")
def tiny_pairs():
  """A preference batch [8, 2, 16] with prompts of 4 tokens and responses of 2 to 11."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 64, (8, 2, 16)).astype(np.int32)
  tokens[:, 1, :4] = tokens[:, 0, :4]
  ends = rng.integers(6, 16, (8, 2, 1))
  places = np.arange(16)
  return {
    "tokens": np.where(places < ends, tokens, 0).astype(np.int32),
    "segment_ids": (places < ends).astype(np.int32),
    "response_mask": ((places >= 4) & (places < ends)).astype(np.float32),
    "weight": np.ones(8, np.float32),
    "margin": np.zeros(8, np.float32),
    "label_prob": np.ones(8, np.float32),
  }
