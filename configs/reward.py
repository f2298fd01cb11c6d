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
  config.records = "pairs"  # or "rankings", "ratings"
  config.centering = 0.01  # of (r+ + r-)^2; Eisenstein et al. 2023 advise 0.01
  config.label_smoothing = 0.0
  # several labellers: soft, majority, unanimous, agreement, heads, spread
  config.votes = config_dict.placeholder(str)
  config.ties = "soft"  # pairs with label_prob 1/2; or "discard", "rao_kupper" with tie_theta
  config.tie_theta = config_dict.placeholder(float)
  config.ranking_loss = config_dict.placeholder(str)  # rankings: "pairs" or "plackett_luce"
  config.aspects = ()  # ratings: a head each
  config.aspect_weights = ()  # and what they add up to as the reward
  # sections: {correlation, orthogonality}; {members, share, trunks, same_head, bootstrap};
  # {source, n, std, columns}
  config.debias = config_dict.placeholder(config_dict.ConfigDict)
  config.ensemble = config_dict.placeholder(config_dict.ConfigDict)
  config.normalise = config_dict.placeholder(config_dict.ConfigDict)
  config.head_first = 0  # steps in which only the head learns
  config.layout = (
    "shared"  # the prompt of a pair once, rows packed; or "padded": two whole rows a pair
  )
  config.accumulate = 1
  config.mesh = common.mesh()
  return config
