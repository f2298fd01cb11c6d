"""Settings of online policy gradients, checked when they are made.

N+ is Huang et al. 2024 (2403.17031), OAI Ziegler et al. 2019 (1909.08593), DAPO Yu et al. 2025
(2503.14476), Secrets Zheng et al. 2023 (2307.04964).
"""

import dataclasses

from align_jax.errors import InputError

GROUPED = ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline")  # compare responses to one prompt
PER_TOKEN = ("gae", "reinforce_pp")  # give every token an advantage of its own
ESTIMATORS = (
  "gae",
  "reinforce",
  "rloo",
  "grpo",
  "dr_grpo",
  "reinforce_pp",
  "reinforce_pp_baseline",
)
POLICY_LOSSES = ("ppo", "reinforce", "cispo", "gspo")
AVERAGES = ("token", "sequence", "constant")


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How responses are drawn. No top-k or top-p: what is trained must be what was sampled."""

  max_new_tokens: int
  temperature: float = 1.0  # InstructGPT 1; OAI and N+ 0.7
  samples_per_prompt: int = 1  # G; GRPO 64, DAPO 16, RLOO 2 and 4
  slots: int | None = None  # rows decoded at a time, refilled as they finish; None: all at once
  stop: tuple[str, ...] = ()  # strings that end a response

  def __post_init__(self):
    for name in ("max_new_tokens", "samples_per_prompt"):
      if getattr(self, name) < 1:
        raise InputError(f"sampling.{name} must be at least 1, not {getattr(self, name)}")
    if self.slots is not None and self.slots < 1:
      raise InputError(f"sampling.slots must be at least 1, not {self.slots}")
    if self.temperature <= 0:
      raise InputError("sampling.temperature must be positive: a greedy policy does not explore")


@dataclasses.dataclass(frozen=True)
class KlConfig:
  """The pull to the reference."""

  coef: float  # N+ 0.05, InstructGPT 0.02, Llama 2 0.005 to 0.01, GRPO 0.04, DAPO 0
  place: str = "reward"  # per token, as InstructGPT; or "loss", as GRPO
  kind: str | None = (
    None  # k1, k2 or k3: the value reported by a KL in the loss; its gradient is k2's
  )
  target: float | None = None  # nats a response; makes coef adaptive; OAI 6
  horizon: float | None = None  # episodes, of the adaptive coef; OAI 10,000

  def __post_init__(self):
    if self.place not in ("reward", "loss"):
      raise InputError(f"kl.place must be reward or loss, not {self.place!r}")
    if (self.place == "loss") != (self.kind is not None):
      raise InputError("kl.kind is to be given exactly when kl.place is loss")
    if self.kind not in (None, "k1", "k2", "k3"):
      raise InputError(f"kl.kind must be k1, k2 or k3, not {self.kind!r}")
    if self.coef < 0 or any(x is not None and x <= 0 for x in (self.target, self.horizon)):
      raise InputError("kl.coef must not be negative, and kl.target and kl.horizon positive")
    if (self.target is None) != (self.horizon is None):
      raise InputError("kl.target and kl.horizon go together")
    if self.target is not None and self.coef == 0:
      raise InputError("kl.target would adapt a kl.coef of 0, which stays 0 for ever")


@dataclasses.dataclass(frozen=True)
class ValueConfig:
  """The critic of the estimator `gae`."""

  lam: float = 0.95
  coef: float = 0.1  # of its loss; OAI and N+ 0.1
  clip_eps: float | None = 0.2  # OAI and N+ 0.2
  warmup: int = 0  # iterations in which the value model alone learns; Secrets pre-trains it

  def __post_init__(self):
    if self.coef <= 0 or self.warmup < 0:
      raise InputError("value.coef must be positive and value.warmup not negative")


@dataclasses.dataclass(frozen=True)
class ImportanceConfig:
  """Weights π_old/μ of tokens for a sampler μ that is not quite the trainer's policy."""

  kind: str  # truncated: min(ratio, high); masked: 0 outside [low, high]
  high: float  # 2 in Yao et al. 2025
  low: float | None = None  # of masked

  def __post_init__(self):
    if self.kind not in ("truncated", "masked"):
      raise InputError(f"importance.kind must be truncated or masked, not {self.kind!r}")
    if (self.kind == "masked") != (self.low is not None):
      raise InputError("importance.low is to be given exactly when importance.kind is masked")
    if not (self.low or 0.0) < self.high or (self.low or 0.0) < 0:
      raise InputError("importance: 0 <= low < high must hold")


@dataclasses.dataclass(frozen=True)
class PolicyGradientConfig:
  """An estimator of the advantage, a loss, and what surrounds them."""

  estimator: str  # one of ESTIMATORS
  loss: str = "ppo"  # one of POLICY_LOSSES
  average: str = "token"  # over the batch (DAPO); "sequence" (GRPO), "constant" (Dr.GRPO)
  epochs: int = 4  # passes over a batch; OAI and N+ 4, InstructGPT 1
  minibatches: int = 1  # optimizer steps a pass; OAI and N+ 1, InstructGPT 8
  clip_eps: float | None = 0.2  # GSPO 3e-4; None with the loss reinforce
  clip_eps_high: float | None = None  # if it differs; DAPO 0.28, GSPO 4e-4; must be given for cispo
  dual_clip: float | None = None  # of the loss ppo; 3 where used
  gamma: float | None = None  # discount of gae and reinforce_pp; 1 for language models
  value: ValueConfig | None = None  # with gae
  kl: KlConfig = KlConfig(0.0)
  entropy_coef: float = 0.0
  whiten_rewards: bool = False  # scale only; OAI does
  whiten_advantages: bool = False  # OAI and N+ do
  importance: ImportanceConfig | None = None
  extra_draws: int = (
    0  # dynamic sampling: batches of prompts drawn to replace groups of equal scores
  )
  ptx_coef: float = 0.0  # of the pretraining loss in PPO-ptx; InstructGPT 27.8
  logits_chunk: int | None = None  # time steps of logits held at once; None holds all
  # Tokens of the rows that log-probs, values and updates are computed in: a prompt once, its responses
  # behind it, several prompts a row. None: a row for each response, as wide as the longest.
  row_length: int | None = None

  def __post_init__(self):
    for name, known in (
      ("estimator", ESTIMATORS), ("loss", POLICY_LOSSES), ("average", AVERAGES)
    ):  # fmt: skip
      if getattr(self, name) not in known:
        raise InputError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
    for name in ("epochs", "minibatches"):
      if getattr(self, name) < 1:
        raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
    if self.row_length is not None and self.row_length < 2:
      raise InputError(f"row_length must be at least 2, not {self.row_length}")
    if self.extra_draws < 0 or self.ptx_coef < 0 or self.entropy_coef < 0:
      raise InputError("extra_draws, ptx_coef and entropy_coef must not be negative")
    self._check_estimator()
    self._check_loss()

  def _check_estimator(self):
    if (self.estimator == "gae") != (self.value is not None):
      raise InputError("value is to be given exactly when estimator is gae")
    if (self.estimator in PER_TOKEN) != (self.gamma is not None):
      raise InputError(f"gamma is to be given exactly for {', '.join(PER_TOKEN)}")
    if self.whiten_rewards and self.estimator != "gae":
      raise InputError(f"whiten_rewards is not used by the estimator {self.estimator}")
    if self.whiten_advantages and self.estimator.startswith("reinforce_pp"):
      raise InputError(f"{self.estimator} whitens its advantages: leave whiten_advantages false")
    if self.extra_draws and self.estimator not in GROUPED:
      raise InputError(f"extra_draws needs groups: an estimator among {', '.join(GROUPED)}")

  def _check_loss(self):
    if (self.loss == "reinforce") != (self.clip_eps is None and self.clip_eps_high is None):
      if self.loss != "cispo" or self.clip_eps_high is None:
        raise InputError(
          "clip_eps is to be given for every loss but reinforce, which clips nothing"
        )
    if self.loss == "cispo" and self.clip_eps_high is None:
      raise InputError("cispo needs clip_eps_high (clip_eps may be None: no lower bound)")
    if self.loss == "reinforce" and self.epochs * self.minibatches > 1:
      raise InputError(
        "reinforce is a gradient of the policy that sampled: one epoch, one minibatch"
      )
    if self.dual_clip is not None and self.loss != "ppo":
      raise InputError(f"dual_clip is not used by the loss {self.loss}")
    if self.loss == "gspo" and self.average != "sequence":
      raise InputError("gspo is a loss of whole responses: set average to sequence")
    if self.loss == "gspo" and self.estimator in PER_TOKEN:
      raise InputError(f"gspo needs one advantage a response, which {self.estimator} does not give")

  @property
  def updates(self) -> int:
    """Optimizer steps of one iteration: what a learning-rate schedule counts."""
    return self.epochs * self.minibatches
