"""The main job on the microworld, in minutes on two CPU cores: SFT, reward model, DPO, IPO, KTO, PPO.

  python -m experiments.pipeline --workdir=runs/quickstart

Demonstrations come from writers good and bad; preferences from labellers of whom two agree on 70 % of
pairs; the gold judge is seen by evaluations only.  `@sft` stands for the workdir of that phase.
"""

from ml_collections import config_dict

from configs import evaluate, ppo, preference, reward, sft

OBJECTIVES = ("dpo", "ipo", "kto")


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.start = "@sft"  # what every policy starts from and is compared with
  config.sft = sft.get_config()
  config.reward = _from("@sft", reward.get_config())
  config.preference = config_dict.ConfigDict()
  for name in OBJECTIVES:
    config.preference[name] = _from("@sft", preference.get_config())
    config.preference[name].objective.name = name
    if name != "kto":  # which draws its mismatched answers anew
      config.preference[name].reference_cache = "@reference"
  config.ppo = _from("@sft", ppo.get_config())
  config.ppo.reward_model = "@reward"
  config.evaluation = evaluate.get_config()
  config.reward_evaluation = evaluate.get_config()
  config.reward_evaluation.data = "microworld:n=1024,split=heldout,draw=3"
  return config


def _from(init: str, config: config_dict.ConfigDict) -> config_dict.ConfigDict:
  config.model.init = init
  return config
