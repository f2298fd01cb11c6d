"""PPO, GRPO and RLOO x three seeds on the microworld, with a KL penalty and without: what it is for.

  python -m experiments.sweep --config=configs/online_sweep.py --workdir=runs/online_sweep

All learn from the same reward model; the gold judge is logged beside it and never learned from. That
reward model is the default one, which stops being right some two nats from where it was trained:
`ppo-kl0` and `rloo-kl0` go there, with no KL penalty, for longer and at twice the rate.
`--config=configs/online_sweep.py:relatives` adds four more estimators and losses.
"""

from ml_collections import config_dict

from configs import evaluate, online, reward, sft

# Overrides of the base, which is RLOO with 16 prompts x 4 responses.
PPO = {
  "prompts": {"batch_size": 64},
  "sampling": {"samples_per_prompt": 1},
  "policy_gradient": {
    "estimator": "gae",
    "gamma": 1.0,
    "whiten_advantages": True,
    "value": {"lam": 0.95, "coef": 0.1, "clip_eps": 0.2, "warmup": 0},
  },
}
IN_THE_LOSS = {"place": "loss", "kind": "k3", "coef": 0.3}  # of advantages with deviation 1
HARDER = {"loop": {"steps": 50}, "optimizer": {"learning_rate": 2e-3}}
VARIANTS = {
  "ppo": PPO,
  "grpo": {"policy_gradient": {"estimator": "grpo", "average": "sequence", "kl": IN_THE_LOSS}},
  "rloo": {},
  "ppo-kl0": PPO | {"policy_gradient": PPO["policy_gradient"] | {"kl": {"coef": 0.0}}} | HARDER,
  "rloo-kl0": {"policy_gradient": {"kl": {"coef": 0.0}}} | HARDER,
}
RELATIVES = {
  "dr_grpo": {"policy_gradient": {"estimator": "dr_grpo", "average": "constant"}},
  "reinforce_pp": {"policy_gradient": {"estimator": "reinforce_pp", "gamma": 1.0}},
  "gspo": {
    "policy_gradient": {
      "estimator": "grpo",
      "loss": "gspo",
      "average": "sequence",
      "clip_eps": 3e-4,
      "clip_eps_high": 4e-4,
      "kl": IN_THE_LOSS,
    }
  },
  "cispo": {
    "policy_gradient": {
      "estimator": "grpo",
      "loss": "cispo",
      "clip_eps": None,
      "clip_eps_high": 2.0,
      "kl": IN_THE_LOSS,
    }
  },
}


def get_config(which: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.start = "@sft"  # trained first; or a trained model, with config.sft = None
  config.sft = sft.get_config()
  config.reward_models = config_dict.create(reward=reward.get_config())  # trained once, by name
  config.reward_models.reward.model.init = "@sft"
  config.online = base(steps=30, learning_rate=1e-3, kl_coef=0.1)
  config.variants = config_dict.ConfigDict()
  for name, settings in (VARIANTS | (RELATIVES if which == "relatives" else {})).items():
    config.variants[name] = config_dict.ConfigDict(settings)
  config.grid = config_dict.ConfigDict()
  config.seeds = (0, 1, 2)
  config.evaluation = evaluate.get_config()
  config.baseline = "rloo"  # whose runs the others are paired with, seed by seed
  config.metric = "gain"  # of the leaderboard: gold reward over the start's
  config.processes = 2  # on this machine, each with cores of its own
  return config


def base(*, steps: int, learning_rate: float, kl_coef: float) -> config_dict.ConfigDict:
  """RLOO from `@sft` against `@reward`, without a seed."""
  config = online.online(
    batch_size=16, samples_per_prompt=4, steps=steps, learning_rate=learning_rate
  )
  del config.seed  # one of `seeds`
  config.model.init = "@sft"
  config.reward_model = "@reward"
  config.policy_gradient = online.policy_gradient("rloo")
  config.policy_gradient.kl.coef = kl_coef
  config.policy_gradient.epochs = 1  # as InstructGPT
  config.optimizer.schedule = "constant"
  return config
