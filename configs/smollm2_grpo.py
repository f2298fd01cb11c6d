"""Dr.GRPO with a verifiable reward on a real model, on two CPU cores: SmolLM2-135M-Instruct with LoRA.

  python -m experiments.ppo --config=configs/smollm2_grpo.py --workdir=runs/smollm2_grpo
  python -m experiments.evaluate --config=configs/smollm2_grpo.py:evaluation --workdir=runs/smollm2_grpo

The prompts are word problems made by code (align_jax.worlds.arithmetic); the reward is 1 where the last
number of the response is right. Names, things and numbers of the evaluation's problems are held out, and
its responses may be twice as long, so that nothing is won where a response is cut off. Training takes about
18 minutes, the evaluation 3.
"""

from ml_collections import config_dict

from configs import common, evaluate, grpo

NEW_TOKENS = 28
MAX_PROMPT = 64
TEMPERATURE = 0.7  # OAI and N+; at 1 the base model rambles


def get_config(part: str = "training") -> config_dict.ConfigDict:
  parts = {"training": _training, "evaluation": _evaluation}
  if part not in parts:
    raise ValueError(f"smollm2_grpo.py has the parts {', '.join(parts)}, not {part!r}")
  return parts[part]()


def _rewards():
  return config_dict.create(correct=config_dict.create(kind="numeric", weight=1.0))


def _training():
  config = grpo.get_config()
  config.model = common.model("smollm2", rank=8)
  config.reward_model = config_dict.placeholder(str)
  config.prompts.update(train="arithmetic:n=4000", batch_size=6, max_length=MAX_PROMPT)
  config.sampling.update(max_new_tokens=NEW_TOKENS, temperature=TEMPERATURE, samples_per_prompt=8)
  config.rewards = _rewards()
  # Divided by its group's deviation (GRPO), the price of not ending would count as much as being right
  # wherever no answer is right, and the policy learn to say little; without a price it may never end.
  config.shaping.missing_eos_penalty = 0.2
  config.policy_gradient.update(estimator="dr_grpo", average="constant")
  config.policy_gradient.update(epochs=1, minibatches=2, logits_chunk=32, row_length=240)
  config.policy_gradient.kl.coef = 0.02
  config.optimizer = common.optimizer(3e-4, schedule="constant")
  config.loop = common.loop(40, checkpoint_every=8)
  return config


def _evaluation():
  config = evaluate.get_config()
  config.data = "arithmetic:n=192,split=heldout"
  config.reference = "smollm2"
  config.scorer = "rewards"
  config.rewards = _rewards()
  config.max_new_tokens = 64
  config.temperature = TEMPERATURE
  config.max_prompt_length = MAX_PROMPT
  config.batch_size = 32
  return config
