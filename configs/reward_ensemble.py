"""Five reward models at once under vmap, whose first heads and data orders differ (Coste et al. 2023).

  python -m experiments.reward --config=configs/reward_ensemble.py --config.model.init=runs/sft \
    --workdir=runs/ensemble

Online learning reads it as {kind: "ensemble", source: "runs/ensemble", combine: "min", standardise: 256};
"average:runs/ensemble" is the one reward model of its mean weights (WARM).
"""

from ml_collections import config_dict

from configs import reward


def get_config() -> config_dict.ConfigDict:
  config = reward.get_config()
  config.ensemble = config_dict.create(
    members=5,
    share="nothing",  # whole models; "base": adapters on one base; "trunk": heads on one trunk
    trunks=(),  # what each begins with, one a member; none: model.init
    same_head=False,  # one first head for all: for average:
    bootstrap=False,  # trunk: each head has its own resample of the records
  )
  config.layout = "padded"  # members take batches of one shape
  return config
