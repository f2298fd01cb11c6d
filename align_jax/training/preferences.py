"""The preference objectives by name: their losses, their settings, and mixtures of them.

A loss says itself what it needs: its positional arguments are arrays, found by name, and its
keyword-only arguments are settings. So a reference is needed exactly where an argument is called
`ref_...`, and a setting that no loss of the run takes is an error.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from align_jax import losses
from align_jax.errors import InputError

Setting = float | bool | str | None


@dataclasses.dataclass(frozen=True)
class Member:
  """One loss of the family, with the defaults of its settings."""

  name: str
  loss: Callable[..., jax.Array]
  defaults: dict[str, Setting]

  @property
  def arrays(self) -> tuple[str, ...]:
    """The names of the arrays it takes."""
    kinds = inspect.signature(self.loss).parameters.values()
    return tuple(p.name for p in kinds if p.kind is not p.KEYWORD_ONLY)

  @property
  def unpaired(self) -> bool:
    """Whether it learns from single responses with a thumb up or down."""
    return "is_desirable" in self.arrays

  @property
  def batchwise(self) -> bool:
    """Whether it compares the pairs of a batch with one another."""
    return "pair_mask" in self.arrays


def _members() -> dict[str, Member]:
  beta = {"beta": 0.1}
  smoothed = beta | {"label_smoothing": 0.0}
  table = {
    "dpo": (losses.dpo_loss, smoothed),
    "cdpo": (losses.cdpo_loss, beta | {"label_smoothing": 0.1}),
    "ipo": (losses.ipo_loss, {"tau": 0.1}),
    "ipo_mean": (losses.ipo_mean_loss, {"tau": 0.1}),
    "hinge": (losses.hinge_loss, beta),
    "slic": (losses.slic_loss, {"delta": 1.0, "sft_weight": 0.1}),
    "robust": (losses.robust_loss, beta | {"label_smoothing": 0.1}),
    "exo": (losses.exo_loss, beta | {"label_smoothing": 1e-3}),
    "nca": (losses.nca_loss, beta),
    "bco": (losses.bco_loss, beta),
    "sppo": (losses.sppo_loss, beta),
    "aot": (losses.aot_loss, smoothed),
    "aot_unpaired": (losses.aot_unpaired_loss, smoothed),
    "apo_zero": (losses.apo_zero_loss, beta),
    "apo_down": (losses.apo_down_loss, beta),
    "discopop": (losses.discopop_loss, beta | {"temperature": 0.05}),
    "dpo_norm": (losses.dpo_norm_loss, {"beta": 5.0}),  # Tülu 3
    "dpop": (losses.dpop_loss, {"beta": 0.3, "penalty": 50.0}),  # Smaug
    "r_dpo": (losses.r_dpo_loss, beta | {"alpha": 0.01}),
    "f_dpo": (losses.f_dpo_loss, beta | {"divergence": "js", "alpha": None}),
    "ld_dpo": (losses.ld_dpo_loss, beta | {"alpha": 0.5}),
    "step_dpo": (losses.step_dpo_loss, beta),
    "tdpo": (losses.tdpo_loss, beta | {"alpha": 0.5, "detach_chosen": True}),
    "simpo": (losses.simpo_loss, {"beta": 2.0, "gamma": 1.0}),
    "alphapo": (losses.alphapo_loss, {"beta": 2.0, "gamma": 1.0, "alpha": 0.1}),
    "orpo": (losses.orpo_loss, beta),
    "cpo": (losses.cpo_loss, beta | {"sft_weight": 1.0}),
    "sft": (losses.sft_loss, {}),
    "kto": (losses.kto_loss, beta | {"desirable_weight": 1.0, "undesirable_weight": 1.0}),
    "apo_zero_unpaired": (losses.apo_zero_unpaired_loss, beta),
    "bco_unpaired": (losses.bco_unpaired_loss, beta),
  }
  return {name: Member(name, loss, defaults) for name, (loss, defaults) in table.items()}


MEMBERS = _members()


@dataclasses.dataclass(frozen=True)
class PreferenceConfig:
  """An objective by name, or a mixture such as "dpo + sft*0.2"; a setting left None has the default
  of the losses that take it, and is an error where none does.
  """

  name: str
  beta: float | None = None
  tau: float | None = None
  label_smoothing: float | None = None
  gamma: float | None = None
  alpha: float | None = None
  temperature: float | None = None
  penalty: float | None = None
  delta: float | None = None
  divergence: str | None = None
  sft_weight: float | None = None
  detach_chosen: bool | None = None
  desirable_weight: float | None = None
  undesirable_weight: float | None = None
  wpo: bool = False  # pairs weighed by how likely the policy itself is to say them
  sync_every: int = 0  # TR-DPO: steps between moves of the reference; 0 leaves it frozen
  sync_alpha: float = 1.0  # TR-DPO: how far the reference moves to the policy; 0.6 where soft

  def __post_init__(self):
    members = [member for member, _ in self.members]
    taken = {name for member in members for name in member.defaults}
    unused = [name for name in _SETTINGS if getattr(self, name) is not None and name not in taken]
    if unused:
      raise InputError(f"objective.{unused[0]} is not used by the objective {self.name!r}")
    if len(members) > 1 and any(member.unpaired for member in members):
      raise InputError(f"objective.name {self.name!r}: only objectives on pairs can be mixed")
    if self.wpo and members[0].unpaired:
      raise InputError(f"objective.wpo weighs pairs, and {self.name!r} has none")
    if self.wpo and any(member.batchwise for member in members):
      raise InputError(f"objective.wpo weighs pairs one by one, which {self.name!r} mixes")
    if self.sync_every < 0 or not 0.0 < self.sync_alpha <= 1.0:
      raise InputError("objective.sync_every must not be negative, and sync_alpha in (0, 1]")
    if not self.sync_every and self.sync_alpha != 1.0:
      raise InputError("objective.sync_alpha is not used while objective.sync_every is 0")
    if self.sync_every and not self.needs_reference:
      raise InputError(f"objective.sync_every: {self.name!r} has no reference to move")
    self._try()

  @property
  def members(self) -> tuple[tuple[Member, float], ...]:
    """Its losses and their weights."""
    parts = {}
    for part in self.name.split("+"):
      name, star, weight = (text.strip() for text in part.partition("*"))
      if name not in MEMBERS:
        known = ", ".join(MEMBERS)
        raise InputError(f"objective.name must be one of {known}, not {name!r}")
      if name in parts:
        raise InputError(f"objective.name {self.name!r} names {name} twice")
      try:
        parts[name] = float(weight) if star else 1.0
      except ValueError:
        raise InputError(f"objective.name {self.name!r}: {weight!r} is no weight") from None
      if not 0.0 < parts[name] < math.inf:
        raise InputError(f"objective.name {self.name!r}: weights must be positive and finite")
    return tuple((MEMBERS[name], weight) for name, weight in parts.items())

  def settings(self, member: Member) -> dict[str, Setting]:
    """The keyword arguments of one of its losses."""
    given = {name: getattr(self, name) for name in member.defaults}
    return {n: d if given[n] is None else given[n] for n, d in member.defaults.items()}

  @property
  def arrays(self) -> frozenset[str]:
    """The names of all arrays that its losses take."""
    return frozenset(name for member, _ in self.members for name in member.arrays)

  @property
  def needs_reference(self) -> bool:
    return any(name.startswith("ref_") for name in self.arrays) or self.needs_distributions

  @property
  def needs_distributions(self) -> bool:
    """Whether the reference's whole distributions are read, which no cache of log-probs has."""
    return "chosen_kl" in self.arrays

  @property
  def unpaired(self) -> bool:
    return self.members[0][0].unpaired

  @property
  def batchwise(self) -> bool:
    return any(member.batchwise for member, _ in self.members)

  @property
  def lead(self) -> Member:
    """The loss whose implicit rewards are reported: the one that needs their mean, BCO, where there
    is one; else the first that scales log-ratios.
    """
    members = [member for member, _ in self.members]
    shifted = [member for member in members if "shift" in member.arrays]
    scaled = [member for member in members if {"beta", "tau"} & set(member.defaults)]
    return (shifted + scaled + members)[0]

  @property
  def reward_scale(self) -> float:
    """What turns log-ratios into implicit rewards: beta or tau of the leading loss."""
    settings = self.settings(self.lead)
    return settings.get("beta", settings.get("tau", 1.0))

  def identity_loss(self) -> float | None:
    """The loss where the policy is its own reference; None where it depends on the batch.

    ln 2 for DPO, 1/(4 tau²) for IPO, 1/2 for KTO...: the losses themselves at log-ratios of 0.
    """
    if self.wpo or not all(self._at_identity(member) for member, _ in self.members):
      return None
    return sum(weight * float(self._at_zero(member)[0]) for member, weight in self.members)

  def _at_identity(self, member: Member) -> bool:
    """Whether the member's value at policy = reference says nothing of the batch."""
    settings = self.settings(member)
    known = any(name.startswith("ref_") for name in member.arrays)
    even = settings.get("desirable_weight") == settings.get("undesirable_weight")
    return known and even and "chosen_lengths" not in member.arrays

  def _at_zero(self, member: Member) -> jax.Array:
    per_token = ("logprobs", "mask", "step_mask")
    zeros = {
      name: jnp.zeros((1, 1) if name.endswith(per_token) and name != "pair_mask" else (1,))
      for name in member.arrays
    }
    special = {"pair_mask": jnp.ones(1), "kl_baseline": 0.0, "shift": 0.0}
    zeros |= {name: special[name] for name in member.arrays if name in special}
    return member.loss(**zeros, **self.settings(member))

  def _try(self) -> None:
    """A setting out of range is said by the loss that takes it, before anything compiles."""
    for member, _ in self.members:
      try:
        jax.eval_shape(lambda member=member: self._at_zero(member))
      except ValueError as error:
        raise InputError(f"objective: {error}") from error


_SETTINGS = tuple(dict.fromkeys(name for member in MEMBERS.values() for name in member.defaults))
