"""The settings of reward modelling, and what of them cannot go together."""

import dataclasses

from align_jax.data import votes
from align_jax.errors import InputError
from align_jax.phases import reward_heads, sections
from align_jax.phases.sections import DataSection, ModelSection
from align_jax.sharding import MeshConfig
from align_jax.training.loop import LoopConfig
from align_jax.training.optimizer import OptimizerConfig

RECORDS = ("pairs", "rankings", "ratings")
# What several labellers' votes become: one label (see `data.votes`), a head each, or a distribution.
VOTES = (*votes.SETTLED, "heads", "spread")
TIES = ("soft", "discard", "rao_kupper")  # of pairs whose label_prob is 1/2
RANKING_LOSSES = ("pairs", "plackett_luce")


@dataclasses.dataclass(frozen=True)
class EnsembleSection:
  """Several reward models at once, under vmap: their first heads and the order of their data differ."""

  members: int  # Coste 5; 4 or 5 suffice
  share: str = "nothing"  # whole models; "base": adapters on one base; "trunk": heads on one trunk
  # trunks that each begins with, one a member (pretraining seeds: Eisenstein 2023); none: model.init
  trunks: tuple[str, ...] = ()
  same_head: bool = False  # one first head for all, as averaging weights needs (WARM)
  bootstrap: bool = False  # trunk: each head has its own resample of the records

  def __post_init__(self):
    if self.members < 2:
      raise InputError(f"ensemble.members must be at least 2, not {self.members}")
    sections.check_one_of("ensemble.share", self.share, reward_heads.SHARES)
    if self.trunks and (self.share != "nothing" or len(self.trunks) != self.members):
      raise InputError("ensemble.trunks: one for each member, and ensemble.share 'nothing'")
    if self.bootstrap and self.share != "trunk":
      raise InputError(
        "ensemble.bootstrap is for share 'trunk': other members have orders of their own"
      )
    if self.same_head and self.share == "trunk":
      raise InputError("ensemble.same_head: members on one trunk would all be the same")


@dataclasses.dataclass(frozen=True)
class DebiasSection:
  """Two heads, of which only the one that is blind to length is kept (ODIN, Chen et al. 2024)."""

  # weight of |corr(quality, length)| - corr(length head, length), between two answers to a prompt
  correlation: float = 1.0
  orthogonality: float = 1.0  # weight of |w_quality . w_length|

  def __post_init__(self):
    if self.correlation <= 0 or self.orthogonality < 0:
      raise InputError("debias.correlation must be positive, debias.orthogonality not negative")


@dataclasses.dataclass(frozen=True)
class NormaliseSection:
  """The scale of the finished reward: that of reference demonstrations' last replies."""

  source: str  # demonstrations, as data.train of SFT
  n: int = 256  # at most so many; OAI 256
  std: bool = False  # deviation 1 too (OAI), or only mean 0 (InstructGPT, N+)
  columns: str | None = None

  def __post_init__(self):
    if self.n < 2:
      raise InputError(f"normalise.n must be at least 2, not {self.n}")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Settings of `experiments.reward`."""

  seed: int
  model: ModelSection
  data: DataSection
  optimizer: OptimizerConfig
  loop: LoopConfig
  records: str = "pairs"  # one of RECORDS
  centering: float = 0.01  # weight of (r+ + r-)^2; Eisenstein et al. 2023 advise 0.01
  label_smoothing: float = 0.0
  votes: str | None = None  # pairs with labels of several labellers: one of VOTES
  ties: str = "soft"  # pairs: one of TIES
  tie_theta: float | None = None  # rao_kupper: equal responses tie with (theta - 1) / (theta + 1)
  ranking_loss: str | None = None  # rankings: one of RANKING_LOSSES; InstructGPT "pairs"
  aspects: tuple[str, ...] = ()  # ratings: the heads
  aspect_weights: tuple[float, ...] = ()  # what they add up to as the reward
  debias: DebiasSection | None = None
  ensemble: EnsembleSection | None = None
  normalise: NormaliseSection | None = None
  head_first: int = 0  # steps in which only the head learns (WARM's linear probe)
  layout: str = (
    "shared"  # the prompt of a pair once, rows packed; or "padded": two whole rows a pair
  )
  accumulate: int = 1
  mesh: MeshConfig = MeshConfig()

  def __post_init__(self):
    if self.model.init == "scratch":
      raise InputError("a reward model needs a trained trunk: model.init cannot be scratch")
    if self.model.logits_chunk is not None:
      raise InputError("model.logits_chunk is not used by a reward model, which has no logits")
    sections.check_one_of("layout", self.layout, sections.LAYOUTS)
    sections.check_one_of("records", self.records, RECORDS)
    sections.check_one_of("ties", self.ties, TIES)
    if not 0 <= self.head_first < self.loop.steps:
      raise InputError("config.head_first must be in [0, loop.steps)")
    if self.centering < 0 or not 0 <= self.label_smoothing <= 0.5:
      raise InputError("config.centering must not be negative, label_smoothing in [0, 0.5]")
    self._check_records()
    self._check_rule()
    if self.ensemble is not None:
      self._check_ensemble()

  def _check_records(self):
    """Settings of one kind of record that another does not use."""
    pairs, rankings, ratings = (self.records == kind for kind in RECORDS)
    not_pairs = {
      "votes": self.votes is not None,
      "ties": self.ties != "soft",
      "label_smoothing": self.label_smoothing > 0,
      "debias": self.debias is not None,
    }
    wrong = [name for name, used in not_pairs.items() if used and not pairs]
    if wrong:
      raise InputError(f"config.{wrong[0]} is for records='pairs', not {self.records!r}")
    if rankings != (self.ranking_loss is not None):
      raise InputError("config.ranking_loss and records='rankings' go together")
    if rankings:
      sections.check_one_of("ranking_loss", self.ranking_loss, RANKING_LOSSES)
    if ratings != bool(self.aspects) or len(self.aspects) != len(self.aspect_weights):
      raise InputError("config.aspects and aspect_weights, one each, are for records='ratings'")
    if len(set(self.aspects)) < len(self.aspects):
      raise InputError(f"config.aspects must each be named once: {self.aspects}")
    if ratings and self.centering:
      raise InputError("config.centering must be 0 with records='ratings', which have a scale")
    if not pairs and self.layout != "padded":
      raise InputError(f"config.layout must be 'padded' with records={self.records!r}")

  def _check_rule(self):
    """What a pair is learned from by: ties, votes and two heads exclude each other."""
    if (self.ties == "rao_kupper") != (self.tie_theta is not None):
      raise InputError("config.tie_theta and ties='rao_kupper' go together")
    if self.tie_theta is not None and not self.tie_theta > 1:
      raise InputError(f"config.tie_theta must be above 1, not {self.tie_theta}")
    if self.votes is not None:
      sections.check_one_of("votes", self.votes, VOTES)
    manners = {
      "ties='rao_kupper'": self.ties == "rao_kupper",
      f"votes={self.votes!r}": self.votes in ("heads", "spread"),
      "debias": self.debias is not None,
    }
    given = [name for name, used in manners.items() if used]
    if len(given) > 1:
      raise InputError(f"config: {' and '.join(given)} cannot go together")
    plain = self.votes != "spread" and self.debias is None and self.ties != "rao_kupper"
    if not plain and self.label_smoothing:
      raise InputError(f"config.label_smoothing is not used with {given[0]}: set it to 0")
    if (self.votes == "spread" or self.debias) and self.centering:
      raise InputError(f"config.centering is not used with {given[0]}: set it to 0")
    if self.debias and self.accumulate > 1:
      raise InputError("config.debias correlates over a whole batch: config.accumulate must be 1")

  def _check_ensemble(self):
    share = self.ensemble.share
    if (share == "base") != (self.model.lora.rank > 0) and share != "trunk":
      raise InputError("ensemble.share: 'base' with model.lora, 'nothing' without, or 'trunk'")
    if share == "trunk":
      odd = self.records != "pairs" or self.ties == "rao_kupper" or self.debias
      if odd or self.votes in ("heads", "spread"):
        raise InputError(
          "ensemble.share='trunk' is for pairs by Bradley-Terry with one head a member"
        )
    elif self.layout != "padded":
      raise InputError("config.layout must be 'padded': members take batches of one shape")
    if self.accumulate > 1:
      raise InputError("config.accumulate must be 1 with an ensemble")
