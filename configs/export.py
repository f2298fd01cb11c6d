"""Export: which checkpoint becomes a Hugging Face folder (the folder is --workdir)."""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.model = "runs/dpo"  # a workdir; adapters are merged into their base
  return config
