"""A phase's checkpoint as a Hugging Face folder."""

import dataclasses

from align_jax import models, sharding
from align_jax.errors import InputError
from align_jax.phases import workspace


@dataclasses.dataclass(frozen=True)
class ExportConfig:
  """Settings of `experiments.export`."""

  model: str  # the workdir to export; adapters are merged into their base


def run(config: ExportConfig, path: str, devices) -> None:
  """Writes config.json, safetensors and the tokenizer to `path`."""
  mesh = sharding.make_mesh(sharding.MeshConfig(), devices)
  loaded = workspace.load(config.model, mesh)
  if loaded.head is not None:
    raise InputError(f"{config.model} is a reward model; only policies can be exported")
  models.save_pretrained(path, loaded.model, loaded.params, tokenizer=loaded.tokenizer)
