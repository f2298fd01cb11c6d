r"""Benchmarks of reward models from local files, each by its own aggregate, beside "longer wins".

  python -m experiments.reward_benchmark --config=configs/reward_benchmark.py \
    --config.model=runs/reward --config.benchmarks.llmbar=LLMBAR.jsonl --workdir=runs/benchmarks

The formats are those of the benchmarks, as JSON Lines or Parquet: align_jax/data/benchmarks.py.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  # "<workdir of a reward model>", "implicit:<workdir of a preference run>",
  # "implicit:<policy>,<reference>,beta=0.1", "longer", or "longer:<model whose tokens are counted>"
  config.model = "longer"
  config.benchmarks = (
    config_dict.create(  # a file, a folder, hf:org/name:split, or several with commas
      rewardbench=config_dict.placeholder(str),
      rewardbench2=config_dict.placeholder(str),
      rm_bench=config_dict.placeholder(str),
      rmb=config_dict.placeholder(str),
      judgebench=config_dict.placeholder(str),
      llmbar=config_dict.placeholder(str),
    )
  )
  config.limit = config_dict.placeholder(int)  # items of each, drawn by the hash of their prompt
  config.length = 1024  # tokens of prompt and answer; longer ones are cut as in training
  config.batch_size = 8  # rows at a time
  config.dtype = "float32"
  config.mesh = common.mesh()
  return config
