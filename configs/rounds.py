r"""Four rounds of preference collection on the microworld, under twelve minutes on two CPU cores.

  python -m experiments.rounds --config=configs/rounds.py --workdir=runs/rounds

On a real model, judged by the reward model that `experiments.reward` left at RM; its prompts are files
of {"prompt"} lines, or others by --config.prompts.columns and --config.evaluation.columns:

  python -m experiments.rounds --workdir=runs/rounds \
    --config=configs/rounds.py:smollm2,TRAIN.jsonl,HELDOUT.jsonl,RM
"""

from ml_collections import config_dict

from configs import common, evaluate, preference, reward, sft


def get_config(real: str = "") -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0  # of prompts, samples and labels
  config.rounds = 4
  config.start = "@sft"  # trained first; or a trained model, with config.sft = None
  config.sft = sft.get_config()
  config.reward = reward.get_config()
  config.reward.model.init = "@sft"
  config.reward_model = (
    "@reward"  # followed on fresh pairs; or a workdir, with config.reward = None
  )
  config.prompts = config_dict.create(
    source="microworld:n=4000,draw=5",
    per_round=512,  # no prompt is used twice
    max_length=26,  # tokens; a longer prompt is left out
    columns=config_dict.placeholder(str),
    chat=True,  # plain-text prompts are wrapped in the chat template
  )
  config.sampling = config_dict.create(
    max_new_tokens=24,
    samples_per_prompt=4,
    temperature=1.0,
    batch_size=256,  # responses decoded at a time
  )
  config.labeller = config_dict.create(
    judge="gold",  # the microworld's; or "reward:<workdir of a reward model>"
    temperature=0.68,  # of P(a over b) = sigmoid((u_a - u_b) / temperature); 0: always the higher
    length_bias=0.0,  # gold only; reward units a word
    agreement_bias=0.0,  # gold only
    flip=0.0,  # chance of a slip of the hand
    pairs="random",  # two different answers; or "best_worst" of all of them
    drop_ties=False,  # True: no pair where the judge sees no difference
    cut="drop",  # or "keep": answers that max_new_tokens cut
  )
  config.earlier_rounds = 0  # whose pairs are trained on again; -1: all
  config.reference = "previous"  # round's policy; or "first": the start, in every round
  config.retrain_reward = True  # after every round, on its own data and all pairs so far
  config.probe_pairs = 256  # of every round, whose log-probs later policies are asked for
  config.preference = preference.get_config()
  config.preference.model.init = "@sft"
  config.preference.data.update(train="collected", length=50)
  config.preference.loop = common.loop(40)
  config.evaluation = evaluate.get_config()
  return _real(config, *real.split(",")) if real else config


def _real(config, start: str, prompts: str, held_out: str, reward_model: str):
  config.start = start
  config.sft = config.reward = None
  config.reward_model = reward_model
  config.retrain_reward = False
  config.rounds = 2
  config.prompts.update(source=prompts, per_round=64, max_length=80)
  config.sampling.update(max_new_tokens=48, temperature=0.7, batch_size=32)
  config.labeller.update(judge=f"reward:{reward_model}", temperature=1.0, cut="keep")
  config.preference.model = common.model(start, rank=8)
  config.preference.model.logits_chunk = 128
  config.preference.data = common.data("collected", None, length=136, batch_size=8)
  config.preference.optimizer = common.optimizer(2e-4)
  config.preference.loop = common.loop(12)
  config.evaluation.update(
    data=held_out, scorer=f"reward:{reward_model}", limit=48, max_new_tokens=48, temperature=0.7,
    max_prompt_length=80, length=136, batch_size=16,
  )  # fmt: skip
  return config
