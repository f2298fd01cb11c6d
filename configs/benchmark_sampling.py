"""Tokens per second of sampling: with and without continuous batching, and next to `transformers`.

  python -m experiments.benchmark --config=configs/benchmark_sampling.py --workdir=runs/sampling

The requests differ in length as answers do: their numbers of new tokens are log-uniform. The side
next to `transformers` needs torch, which nothing else here does; without it, it is left out. Some
five minutes on two CPU cores that do nothing else; others' work slows torch much more than XLA.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.sets = config_dict.ConfigDict()
  config.sets.smollm2 = requests(
    common.model("smollm2", remat="none"), requests=64, slots=8, prompt_length=32, equal_tokens=64
  )
  config.sets.microworld = requests(
    common.microworld_model(), requests=512, slots=64, prompt_length=32, equal_tokens=0
  )
  config.repeats = 3
  config.mesh = common.mesh()
  return config


def requests(model, *, requests: int, slots: int, prompt_length: int, equal_tokens: int):
  config = config_dict.ConfigDict()
  config.model = model
  config.requests = requests  # of mixed lengths
  config.slots = slots  # rows in flight, on all sides
  config.prompt_length = prompt_length  # the longest prompt
  config.new_tokens = (8, 128)  # of a request, log-uniform
  config.equal_tokens = equal_tokens  # for every row next to transformers; 0: not compared
  return config
