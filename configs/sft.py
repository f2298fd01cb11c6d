"""SFT from scratch on the microworld: a 0.8 M model answers its world after about two CPU minutes.

python -m experiments.sft --config=configs/sft.py --workdir=runs/sft
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0
  config.model = common.microworld_model()
  config.data = common.data(
    "microworld:n=20000", "microworld:n=512,split=heldout,draw=1", length=64, batch_size=16
  )
  config.optimizer = common.optimizer(3e-3, weight_decay=0.01)
  config.optimizer.b2 = 0.98
  config.loop = common.loop(700, eval_every=350)
  config.pack = True  # several records in a row, isolated by segment ids
  config.accumulate = 1  # parts a batch is split into
  config.mesh = common.mesh()
  return config
