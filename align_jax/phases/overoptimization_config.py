"""Settings of the over-optimisation laboratory, and the proxies and runs that they ask for."""

import dataclasses
import pathlib
import re

from align_jax.errors import InputError
from align_jax.evals import best_of_n
from align_jax.phases import online, records, reward, sft
from align_jax.rl import rewards

TRUNK, POLICY, PROXY = (
  "trunk",
  "policy",
  "proxy",
)  # what a section says where the laboratory fills in
SURE = 1e-6  # temperature of a labeller that never errs; where gold ties it tosses a coin
_DRAWS = 1000  # between those of independent proxies
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclasses.dataclass(frozen=True)
class PoolSection:
  """The samples of the policy that every proxy chooses from: drawn once, scored once where they repeat."""

  prompts: str  # microworld:...
  samples: int  # N, to each prompt; a few times the largest n
  max_new_tokens: int
  max_prompt_length: int  # tokens; longer prompts lose their beginning
  temperature: float = 1.0
  batch_size: int = 256  # responses decoded at a time
  part: int = 8  # prompts between two saves

  def __post_init__(self):
    if min(self.samples, self.batch_size, self.part) < 1 or self.samples % self.batch_size:
      raise InputError(
        "config.pool: samples, batch_size and part must be positive, and batch_size divide samples"
      )
    if self.temperature <= 0:
      raise InputError("config.pool.temperature must be positive: greedy answers are all the same")


@dataclasses.dataclass(frozen=True)
class Arm:
  """Proxy reward models of one size, on labels of one kind: one for every amount and seed."""

  size: str  # one of config.sizes
  comparisons: tuple[int, ...]
  temperature: float = 0.0  # of the labeller; 0: always the higher gold reward (Gao et al.)
  seeds: tuple[int, ...] = (0,)  # of head and order; trunk and comparisons are the same for all
  independent: bool = False  # or: every seed on a trunk and on comparisons of its own

  def __post_init__(self):
    for name in ("comparisons", "seeds"):
      values = getattr(self, name)
      if not values or len(set(values)) < len(values):
        raise InputError(f"{name} must list one or more different numbers, not {values}")
    if min(self.comparisons) < 1 or self.temperature < 0:
      raise InputError("comparisons must be positive, and temperature not negative")


@dataclasses.dataclass(frozen=True)
class Ensemble:
  """All seeds of an arm at one amount as one proxy, standardised on the pool."""

  arm: str
  comparisons: int
  combine: str  # mean, min or uwo
  variance_coef: float | None = None  # uwo: lambda; Coste 0.5 for best-of-n

  def __post_init__(self):
    rewards.check_combination(self.combine, self.variance_coef)


@dataclasses.dataclass(frozen=True)
class RlRun:
  """Online learning against one proxy, the arm's first seed, or all its seeds combined."""

  arm: str
  comparisons: int
  kl_coef: float
  combine: str | None = None
  variance_coef: float | None = None  # uwo: lambda; Coste 0.1 for PPO

  def __post_init__(self):
    if self.combine is not None:
      rewards.check_combination(self.combine, self.variance_coef)
    elif self.variance_coef is not None:
      raise InputError("variance_coef is not used without combine")


@dataclasses.dataclass(frozen=True)
class Proxy:
  """One reward model: what it is, and where."""

  size: str
  comparisons: int
  temperature: float
  seed: int
  independent: bool = False

  @property
  def name(self) -> str:
    labels = f"t{self.temperature:g}" if self.temperature else "gold"
    own = "-own" if self.independent else ""
    return f"{self.size}-{self.comparisons}-{labels}-s{self.seed}{own}"

  @property
  def trunk(self) -> "Trunk":
    return Trunk(self.size, self.seed if self.independent else 0)


@dataclasses.dataclass(frozen=True)
class Trunk:
  """What a size's proxies start from; the seed counts from that of config.sft."""

  size: str
  seed: int = 0

  @property
  def name(self) -> str:
    return f"{self.size}-s{self.seed}" if self.seed else self.size


@dataclasses.dataclass(frozen=True)
class OveroptimizationConfig:
  """Settings of `experiments.overoptimization`.

  Sections of trainings say "trunk", "policy" and "proxy" where the laboratory puts in what it made.
  """

  seed: int  # of the pool
  sizes: dict[str, dict]  # name -> overrides of sft.model.scratch
  policy: str  # the size that is sampled and trained further
  sft: sft.SftConfig  # of every size
  reward: reward.RewardConfig  # of every proxy; loop.steps is the least
  epochs: float  # over the comparisons, where that is more than loop.steps
  arms: dict[str, Arm]
  held_out: str  # pairs for the accuracy of proxies: microworld:...
  pool: PoolSection
  best_of: tuple[int, ...]  # n
  fit_up_to: int  # n that the law is fitted to before it predicts the rest
  ensembles: dict[str, Ensemble]
  rl: online.OnlineConfig | None
  rl_runs: dict[str, RlRun]
  rl_window: int = 5  # iterations that one point averages over
  rl_fit_share: float = 0.6  # of the largest distance, that the law is fitted to
  start_samples: int = 1024  # of the policy on the prompts of rl: where gold starts there
  processes: int = 1  # on this machine

  def __post_init__(self):
    best_of_n.check_sizes(self.best_of, self.pool.samples)
    if self.policy not in self.sizes:
      raise InputError(f"config.policy must be one of config.sizes, not {self.policy!r}")
    if self.epochs <= 0 or self.processes < 1 or self.rl_window < 2 or self.start_samples < 2:
      raise InputError(
        "config: epochs and processes must be positive, rl_window and start_samples at least 2"
      )
    if not 0 < self.rl_fit_share < 1:
      raise InputError("config.rl_fit_share must lie between 0 and 1")
    if not self.arms:
      raise InputError("config.arms is empty: at least one proxy is needed")
    self._check_sections()
    self._check_names()

  def _check_sections(self):
    if self.sft.model.scratch is None:
      raise InputError("config.sft.model.init must be 'scratch': config.sizes are shapes of it")
    if self.reward.model.init != TRUNK:
      raise InputError(f"config.reward.model.init must be {TRUNK!r}: the sizes are the trunks")
    sources = {"reward.data.train": self.reward.data.train, "held_out": self.held_out}
    for name, source in (sources | {"pool.prompts": self.pool.prompts}).items():
      if not records.is_world(source):
        raise InputError(f"config.{name} must be of the microworld, where gold is known: {source}")
    if "temperature" in self.reward.data.train:
      raise InputError("config.reward.data.train: the temperature is that of config.arms")
    if (self.rl is None) != (not self.rl_runs):
      raise InputError("config.rl and config.rl_runs go together: give both or neither")
    if self.rl is None:
      return
    if self.rl.model.init != POLICY or self.rl.reward_model != PROXY or self.rl.seed != self.seed:
      raise InputError(
        f"config.rl: model.init must be {POLICY!r}, reward_model {PROXY!r}, and seed config.seed"
      )
    terms = {name: (term.kind, term.source) for name, term in self.rl.rewards.items()}
    if terms != {PROXY: ("model", None), "gold": ("gold", None)} or self.rl.rewards["gold"].weight:
      raise InputError(
        f"config.rl.rewards must be {PROXY!r} of kind 'model' and 'gold' of kind 'gold' and weight 0"
      )
    if self.rl.policy_gradient is None:
      raise InputError("config.rl.policy_gradient must be given: rl_runs set its KL coefficient")

  def _check_names(self):
    at_hand = records.parse_world(self.reward.data.train).n
    for kind in ("sizes", "arms", "ensembles", "rl_runs"):
      for name in getattr(self, kind):
        if not _NAME.fullmatch(name):
          raise InputError(f"config.{kind}: {name!r}: a name is made of letters, digits, _ and -")
    for name, arm in self.arms.items():
      if arm.size not in self.sizes:
        raise InputError(f"config.arms.{name}.size must be one of config.sizes, not {arm.size!r}")
      if max(arm.comparisons) > at_hand:
        raise InputError(f"config.arms.{name}: config.reward.data.train has {at_hand} comparisons")
    users = {f"ensembles.{name}": e for name, e in self.ensembles.items()}
    for name, user in (users | {f"rl_runs.{n}": r for n, r in self.rl_runs.items()}).items():
      if user.arm not in self.arms or user.comparisons not in self.arms[user.arm].comparisons:
        raise InputError(f"config.{name}: there is no arm {user.arm!r} with {user.comparisons}")
      if user.combine and len(self.arms[user.arm].seeds) < 2:
        raise InputError(f"config.{name} combines the seeds of arm {user.arm!r}, which has one")

  @property
  def world_seed(self) -> int:
    return records.parse_world(self.pool.prompts).seed

  def members(self, of: Arm, comparisons: int) -> list[Proxy]:
    """The arm's proxies at one amount, seed by seed."""
    return [Proxy(of.size, comparisons, of.temperature, seed, of.independent) for seed in of.seeds]

  @property
  def proxies(self) -> list[Proxy]:
    """All of them, each once."""
    arms = self.arms.values()
    found = (proxy for arm in arms for n in arm.comparisons for proxy in self.members(arm, n))
    return list(dict.fromkeys(found))

  def sft_config(self, trunk: Trunk) -> sft.SftConfig:
    scratch = dataclasses.replace(self.sft.model.scratch, **self.sizes[trunk.size])
    model = dataclasses.replace(self.sft.model, scratch=scratch)
    return dataclasses.replace(self.sft, model=model, seed=self.sft.seed + trunk.seed)

  def reward_config(self, proxy: Proxy, root: pathlib.Path) -> reward.RewardConfig:
    """The base with the trunk, the labels, the seed and as many steps as the comparisons need."""
    base, world = self.reward, records.parse_world(self.reward.data.train)
    temperature = proxy.temperature or SURE
    draw = world.draw + (_DRAWS * proxy.seed if proxy.independent else 0)
    train = (
      f"microworld:seed={world.seed},n={proxy.comparisons},draw={draw},split={world.split},"
      f"temperature={temperature!r},length_bias={world.length_bias!r},"
      f"agreement_bias={world.agreement_bias!r}"
    )
    steps = max(base.loop.steps, round(self.epochs * proxy.comparisons / base.data.batch_size))
    return dataclasses.replace(
      base,
      seed=proxy.seed,
      model=dataclasses.replace(base.model, init=str(root / "sft" / proxy.trunk.name)),
      data=dataclasses.replace(base.data, train=train),
      loop=dataclasses.replace(base.loop, steps=steps),
    )

  def rl_config(self, run: RlRun, root: pathlib.Path) -> online.OnlineConfig:
    """The base with its policy, its proxy or ensemble, and its KL coefficient."""
    base = self.rl
    members = self.members(self.arms[run.arm], run.comparisons)
    paths = [str(root / "proxies" / proxy.name) for proxy in members]
    terms = dict(base.rewards)
    if run.combine:
      terms[PROXY] = dataclasses.replace(
        terms[PROXY],
        kind="ensemble",
        source=",".join(paths),
        combine=run.combine,
        variance_coef=run.variance_coef,
      )
    gradient = base.policy_gradient
    kl = dataclasses.replace(gradient.kl, coef=run.kl_coef)
    return dataclasses.replace(
      base,
      model=dataclasses.replace(base.model, init=str(root / "sft" / self.policy)),
      reward_model=paths[0],
      rewards=terms,
      policy_gradient=dataclasses.replace(gradient, kl=kl),
    )
