"""Twelve objectives x three seeds on the microworld: which buys most reward for its KL?

  python -m experiments.sweep --config=configs/sweep.py --workdir=runs/sweep

A variant is a set of overrides of `preference`. `grid` adds alternatives to every variant and
`variants.<name>.grid` to one of them, e.g. `grid.optimizer.learning_rate = (1e-4, 3e-4)`.
"""

from ml_collections import config_dict

from configs import evaluate, preference, sft

FLIPPED = 0.18  # labellers agree on 70 % of pairs: (1 - x)² + x²
VARIANTS = {
  "dpo": {"beta": 0.1},
  "cdpo": {"beta": 0.1, "label_smoothing": FLIPPED},
  "ipo": {"tau": 0.1},  # margins are pulled to 5 nats
  "hinge": {"beta": 0.1},
  "robust": {"beta": 0.1, "label_smoothing": FLIPPED},
  "sppo": {"beta": 0.1},
  "apo_zero": {"beta": 0.1},
  "simpo": {"beta": 2.0, "gamma": 1.0},
  "orpo": {"beta": 1.0},
  "cpo": {"beta": 0.1, "sft_weight": 1.0},
  "dpop": {"beta": 0.1, "penalty": 1.0},  # Smaug's 50 all but keeps so short answers where they are
  "kto": {"beta": 0.1},
}

NOT_CACHED = ("simpo", "orpo", "cpo", "kto")  # without a reference, or with answers drawn anew


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.start = "@sft"  # trained first; or a trained model, with config.sft = None
  config.sft = sft.get_config()
  config.preference = preference.get_config()
  del config.preference.seed  # one of `seeds`
  config.preference.model.init = "@sft"
  config.variants = config_dict.ConfigDict()
  for name, settings in VARIANTS.items():
    config.variants[name] = config_dict.create(objective={"name": name} | settings)
    if name not in NOT_CACHED:
      config.variants[name].reference_cache = "@reference"  # one pass for all of them
  config.grid = config_dict.ConfigDict()
  config.seeds = (0, 1, 2)
  config.evaluation = evaluate.get_config()
  config.baseline = "dpo"  # whose runs the others are paired with, seed by seed
  config.metric = "score"  # of the leaderboard: score kl sqrt_kl win_rate length finished ...
  config.processes = 2  # on this machine, each with cores of its own
  return config
