"""PPO as in InstructGPT (Ouyang et al. 2022) from an SFT checkpoint and a reward model, on the microworld.

  python -m experiments.ppo --workdir=runs/ppo \\
    --config.model.init=runs/sft --config.reward_model=runs/reward
"""

from ml_collections import config_dict

from configs import common


def ppo(max_new_tokens: int):
  config = config_dict.ConfigDict()
  config.max_new_tokens = max_new_tokens
  config.temperature = 1.0  # InstructGPT 1; OAI and N+ 0.7
  config.epochs = 2  # passes over a batch; OAI and N+ 4, InstructGPT 1
  config.minibatches = 1  # optimizer steps a pass; InstructGPT 8
  config.clip_eps = 0.2
  config.clip_eps_high = config_dict.placeholder(float)  # DAPO 0.28
  config.dual_clip = config_dict.placeholder(float)  # 3 where used
  config.value_clip_eps = 0.2
  config.value_coef = 0.1
  config.entropy_coef = 0.0
  config.gamma = 1.0
  config.lam = 0.95
  config.kl_coef = 0.05  # N+ 0.05, InstructGPT 0.02, Llama 2 0.005 to 0.01
  config.kl_target = config_dict.placeholder(float)  # nats a sequence; adaptive; OAI 6
  config.kl_horizon = 10_000.0  # episodes
  config.whiten_rewards = False  # scale only; OAI does
  config.whiten_advantages = True
  config.shaping = config_dict.ConfigDict()
  config.shaping.missing_eos_score = config_dict.placeholder(float)  # N+: -1
  config.shaping.missing_eos_penalty = 1.0
  config.shaping.normalise = False  # by running mean and standard deviation
  config.shaping.clip = config_dict.placeholder(float)
  config.logits_chunk = config_dict.placeholder(int)  # time steps of logits at once; None: all
  return config


def get_config() -> config_dict.ConfigDict:
  config = config_dict.ConfigDict()
  config.seed = 0
  config.model = common.model("runs/sft")
  config.reward_model = "runs/reward"  # workdir; its weights also start the value model
  config.prompts = config_dict.create(
    train="microworld:n=4000,draw=4",
    batch_size=64,  # rollouts an iteration
    max_length=26,  # tokens; a longer prompt is left out
    columns=config_dict.placeholder(str),
    limit=config_dict.placeholder(int),
    chat=True,  # plain-text prompts are wrapped in the chat template
  )
  config.ppo = ppo(max_new_tokens=24)
  config.optimizer = common.optimizer(3e-4, schedule="linear")
  config.loop = common.loop(30)
  config.accumulate = 1
  config.mesh = common.mesh()
  return config
