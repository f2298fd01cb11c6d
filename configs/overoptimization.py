"""Over-optimisation on the microworld (Gao et al. 2022, Coste et al. 2023), under 30 minutes on two cores.

  python -m experiments.overoptimization --config=configs/overoptimization.py --workdir=runs/gao

Three sizes of proxy on four amounts of comparisons that the gold judge labelled, the same with a labeller
that errs, ensembles of five, best-of-n up to 1,024, and PPO at four KL coefficients. `:smoke` is the
same in seconds, too small to find anything.
"""

from ml_collections import config_dict

from configs import common, ppo, reward, sft

AMOUNTS = (128, 512, 2048, 8192)
NOISY = 0.68  # two such labellers agree on 70 % of pairs


def get_config(which: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0  # of the pool
  config.sizes = config_dict.create(  # overrides of sft.model.scratch
    small=dict(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=96),
    medium=dict(layers=2, embed_dim=64, heads=2, kv_heads=2, mlp_dim=192),
    large=dict(layers=4, embed_dim=128, heads=4, kv_heads=4, mlp_dim=384),
  )
  config.policy = "large"  # the size that is sampled and trained further
  config.sft = sft.get_config()
  config.sft.data.eval = config_dict.placeholder(str)
  config.reward = reward.get_config()
  config.reward.model.init = "trunk"  # of the proxy's size
  config.reward.data.update(train=f"microworld:n={AMOUNTS[-1]},draw=6", eval=None)
  config.reward.loop = common.loop(48)  # at least; more for `epochs` of many comparisons
  config.epochs = 2.0
  config.arms = _arms()
  config.held_out = "microworld:n=2048,split=heldout,draw=3"  # pairs, for the accuracy of proxies
  config.pool = config_dict.create(
    prompts="microworld:n=128,split=heldout,draw=7",
    samples=2048,  # to each prompt
    max_new_tokens=24,
    max_prompt_length=32,  # longer prompts lose their beginning
    temperature=1.0,
    batch_size=512,  # responses decoded at a time
    part=8,  # prompts between two saves
  )
  config.best_of = (1, 2, 4, 8, 11, 16, 23, 32, 45, 64, 128, 256, 512, 1024)
  config.fit_up_to = 64  # n; the law predicts the rest (Gao: fitted to 1,000, predicted 60,000)
  config.ensembles = config_dict.create(
    **{
      f"{labels}-{how}": dict(arm=labels, comparisons=512, combine=how, variance_coef=coef)
      for labels in ("medium", "noisy", "apart")
      for how, coef in (("mean", None), ("min", None), ("uwo", 0.5))
    }
  )
  config.rl = _rl()
  config.rl_runs = _rl_runs()
  config.rl_window = 3  # iterations a point
  config.rl_fit_share = 0.6  # of the largest distance; the law predicts the rest
  config.start_samples = 2048  # of the policy on the prompts of rl
  config.processes = 2  # on this machine, each with cores of its own
  return _smoke(config) if which == "smoke" else config


def _arms() -> dict:
  seeds = (0, 1, 2, 3, 4)
  return config_dict.create(
    small=dict(size="small", comparisons=AMOUNTS, temperature=0.0, seeds=(0, 1, 2)),
    medium=dict(size="medium", comparisons=AMOUNTS, temperature=0.0, seeds=seeds),
    large=dict(size="large", comparisons=AMOUNTS, temperature=0.0, seeds=(0,)),
    noisy=dict(size="medium", comparisons=AMOUNTS, temperature=NOISY, seeds=seeds),
    apart=dict(  # as noisy, but no two of them share a trunk or a comparison
      size="medium", comparisons=(512,), temperature=NOISY, seeds=seeds, independent=True
    ),
  )


def _rl():
  config = ppo.get_config()
  config.model.init, config.reward_model = "policy", "proxy"
  config.optimizer.update(learning_rate=5e-4, schedule="constant")
  config.loop = common.loop(100)
  config.rewards = config_dict.create(
    proxy=dict(kind="model", weight=1.0, standardise=512),
    gold=dict(kind="gold", weight=0.0),  # logged, never learned from
  )
  return config


def _rl_runs() -> dict:
  """Four KL coefficients, two more amounts of comparisons, and the ensemble, most without a KL."""
  single = dict(arm="medium", comparisons=512)
  coefs = {"kl0": 0.0, "kl3e-2": 0.03, "kl1e-1": 0.1, "kl3e-1": 0.3}
  runs = {name: dict(kl_coef=coef, **single) for name, coef in coefs.items()}
  for amount in (128, 8192):
    runs[f"comparisons{amount}"] = dict(arm="medium", comparisons=amount, kl_coef=0.0)
  runs["min"] = dict(kl_coef=0.0, combine="min", **single)
  runs["uwo"] = dict(kl_coef=0.0, combine="uwo", variance_coef=0.5, **single)
  return config_dict.create(**runs)


def _smoke(config):
  tiny = dict(layers=1, embed_dim=32, heads=2, kv_heads=2, mlp_dim=64)
  config.sizes = config_dict.create(tiny=tiny, wide=dict(tiny, embed_dim=48))
  config.policy = "tiny"
  for section, steps in ((config.sft, 6), (config.reward, 3), (config.rl, 8)):
    section.loop.steps = steps
  config.sft.data.update(train="microworld:n=64", batch_size=8)
  config.reward.data.update(train="microworld:n=32,draw=6", batch_size=8)
  config.epochs = 1.0
  config.arms = config_dict.create(
    tiny=dict(size="tiny", comparisons=(16, 32), temperature=0.0, seeds=(0, 1)),
    wide=dict(size="wide", comparisons=(16,), temperature=0.0, seeds=(0,)),
    noisy=dict(size="tiny", comparisons=(16, 32), temperature=NOISY, seeds=(0,)),
  )
  config.held_out = "microworld:n=32,split=heldout,draw=3"
  config.pool.update(
    prompts="microworld:n=4,split=heldout,draw=7", samples=64, batch_size=32, part=2,
    max_new_tokens=8,
  )  # fmt: skip
  config.best_of = (1, 2, 4, 8, 12, 16, 24, 32)
  config.fit_up_to = 16
  config.ensembles = config_dict.create(
    min=dict(arm="tiny", comparisons=16, combine="min", variance_coef=None)
  )
  config.rl.prompts.update(train="microworld:n=64,draw=4", batch_size=8)
  config.rl.sampling.max_new_tokens = 8
  config.rl.rewards.proxy.standardise = 16
  config.rl_runs = config_dict.create(
    kl0=dict(arm="tiny", comparisons=16, kl_coef=0.0),
    min=dict(arm="tiny", comparisons=16, kl_coef=0.0, combine="min"),
  )
  config.rl_window, config.start_samples = 2, 16
  return config
