"""The time of an SFT and a DPO step by row length, batch, LoRA rank and vocabulary; of a run's first step.

  python -m experiments.benchmark --config=configs/benchmark_scaling.py --workdir=runs/benchmark_scaling

A random transformer of two layers whose steps take up to two seconds on two CPU cores; some ten minutes
in all. `--config.first_step.module=''` leaves out the time to the first step.
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.model = common.microworld_model()
  config.model.scratch.update(layers=2, heads=2, kv_heads=2)
  config.model.remat = "dots"
  config.model.logits_chunk = 128
  config.steps = ("sft", "dpo")
  # Where another size varies: tokens a row, rows a step, of adapters (0: all weights train), of tokens.
  config.base = config_dict.create(length=512, batch=1, rank=0, vocab=4096)
  config.axes = config_dict.create(
    length=(256, 512, 1024, 2048, 4096),
    batch=(1, 2, 4, 8, 16),
    rank=(2, 8, 32, 128),
    vocab=(1024, 4096, 16384, 65536),
  )
  config.repeats = 9
  config.first_step = config_dict.create(
    module="experiments.sft",
    arguments=("--config=configs/sft.py",),
    warm_repeats=3,
    timeout_s=300.0,
  )
  config.mesh = common.mesh()
  return config
