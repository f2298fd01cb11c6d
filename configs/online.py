"""Sections that the configs of online learning share."""

from ml_collections import config_dict

from configs import common


def online(*, batch_size: int, samples_per_prompt: int, steps: int, learning_rate: float):
  """Prompts of the microworld, scored by a reward model, the gold judge logged beside it."""
  config = config_dict.ConfigDict()
  config.seed = 0
  config.model = common.model("runs/sft")
  config.reward_model = "runs/reward"  # workdir; starts the value model, and rewards of kind model
  config.prompts = config_dict.create(
    train="microworld:n=4000,draw=4",
    batch_size=batch_size,  # prompts an iteration
    max_length=26,  # tokens; a longer prompt is left out
    columns=config_dict.placeholder(str),
    limit=config_dict.placeholder(int),
    chat=True,  # plain-text prompts are wrapped in the chat template
  )
  config.sampling = config_dict.create(
    max_new_tokens=24,
    temperature=1.0,  # InstructGPT 1; OAI and N+ 0.7
    samples_per_prompt=samples_per_prompt,  # G; GRPO 64, DAPO 16, RLOO 2 and 4
    slots=config_dict.placeholder(int),  # rows decoded at a time, refilled; None: all at once
    stop=(),  # strings that end a response
  )
  config.rewards = config_dict.create(
    model=config_dict.create(kind="model", weight=1.0),
    gold=config_dict.create(kind="gold", weight=0.0),  # logged, never learned from
  )
  config.shaping = shaping()
  config.stops = stops()
  config.rollouts = config_dict.create(
    every=10,  # iterations between entries of rollouts.jsonl; 0 keeps nothing
    rows=8,  # of each
  )
  config.optimizer = common.optimizer(learning_rate, schedule="linear")
  config.loop = common.loop(steps)
  config.accumulate = 1
  config.mesh = common.mesh()
  return config


def shaping():
  config = config_dict.ConfigDict()
  config.missing_eos_score = config_dict.placeholder(float)  # replaces the score; N+ -1, Tülu 3 -10
  config.missing_eos_penalty = 1.0  # or is taken off it
  config.overlong_cache = config_dict.placeholder(int)  # tokens; DAPO 4096 of 20480
  config.normalise = False  # by running mean and standard deviation
  config.clip = config_dict.placeholder(float)  # Secrets, after normalising: 5
  return config


def stops():
  """What ends a run early; a loss that is not finite always does."""
  config = config_dict.ConfigDict()
  config.kl_max = config_dict.placeholder(float)  # nats a response
  config.distinct_min = config_dict.placeholder(float)  # share of distinct responses
  config.bigrams_min = config_dict.placeholder(float)  # share of distinct bigrams in a batch
  config.repetition_max = config_dict.placeholder(float)  # share of repeated 4-grams in a response
  config.length_min = config_dict.placeholder(float)  # tokens, mean
  config.length_max = config_dict.placeholder(float)
  config.entropy_min = config_dict.placeholder(float)  # nats a token
  config.eos_rate_min = config_dict.placeholder(float)
  config.ratio_max = config_dict.placeholder(float)
  config.mismatch_max = config_dict.placeholder(float)  # nats a token
  config.score_drop = config_dict.placeholder(float)  # below the best score so far
  config.patience = 1  # consecutive steps beyond a limit
  config.first_step = 0  # steps before it are not looked at
  return config


def policy_gradient(estimator: str):
  """An estimator without a critic, its KL in the reward."""
  config = config_dict.ConfigDict()
  config.estimator = estimator  # gae, reinforce, rloo, grpo, dr_grpo, reinforce_pp(_baseline)
  config.loss = "ppo"  # or reinforce, cispo, gspo
  config.average = "token"  # DAPO; "sequence" GRPO, "constant" Dr.GRPO
  config.epochs = 2  # passes over a batch; OAI and N+ 4, InstructGPT 1
  config.minibatches = 1  # optimizer steps a pass; OAI and N+ 1, InstructGPT 8
  config.clip_eps = 0.2  # GSPO 3e-4
  config.clip_eps_high = config_dict.placeholder(float)  # DAPO 0.28, GSPO 4e-4
  config.dual_clip = config_dict.placeholder(float)  # 3 where used
  config.gamma = config_dict.placeholder(float)  # of gae and reinforce_pp
  config.value = config_dict.placeholder(config_dict.ConfigDict)  # of gae
  config.kl = config_dict.create(
    coef=0.05,  # N+ 0.05, InstructGPT 0.02, Llama 2 0.005 to 0.01, GRPO 0.04, DAPO 0
    place="reward",  # per token (InstructGPT); or "loss" (GRPO)
    kind=config_dict.placeholder(
      str
    ),  # in the loss: k1, k2, k3, of the value; the gradient is k2's
    target=config_dict.placeholder(float),  # nats a response; adaptive; OAI 6
    horizon=config_dict.placeholder(float),  # episodes; OAI 10,000
  )
  config.entropy_coef = 0.0
  config.whiten_rewards = False  # scale only; OAI does
  config.whiten_advantages = False  # OAI and N+ do
  config.importance = config_dict.placeholder(
    config_dict.ConfigDict
  )  # {kind: truncated, high: 2.0}
  config.extra_draws = 0  # batches that dynamic sampling may draw (DAPO)
  config.ptx_coef = 0.0  # InstructGPT 27.8; needs the section ptx
  config.logits_chunk = config_dict.placeholder(int)  # time steps of logits at once; None: all
  # Tokens of rows that hold a prompt once, its responses behind it, and several prompts; None: no such.
  config.row_length = config_dict.placeholder(int)
  return config
