"""A Bradley–Terry reward model on the SFT trunk (Ouyang et al. 2022), here on microworld preferences.

python -m experiments.reward --config=configs/reward.py --config.model.init=runs/sft --workdir=runs/reward
"""

from ml_collections import config_dict

from configs import common


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0
  config.model = common.model("runs/sft")
  config.data = common.data(
    "microworld:n=6000", "microworld:n=512,split=heldout,draw=1", length=46, batch_size=32
  )
  config.optimizer = common.optimizer(5e-4, weight_decay=0.01)
  config.loop = common.loop(150, eval_every=50)
  config.centering = 0.01  # of (r+ + r-)^2; Eisenstein et al. 2023 advise 0.01
  config.label_smoothing = 0.0
  config.layout = (
    "shared"  # the prompt of a pair once, rows packed; or "padded": two whole rows a pair
  )
  config.accumulate = 1
  config.mesh = common.mesh()
  return config
