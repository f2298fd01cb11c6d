"""Settings of a conversation: `--config.model` is a workdir, a Hugging Face folder or a name."""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.model = "smollm2"
  config.system = config_dict.placeholder(str)  # a system message to begin with
  config.temperature = 0.7  # 0 answers greedily
  config.top_p = 0.95
  config.max_new_tokens = 128
  config.max_prompt_length = 1024
  config.seed = 0
  config.mesh = common.mesh()
  return config
