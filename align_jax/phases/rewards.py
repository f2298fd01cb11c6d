"""Rewards by their settings: what a score is made of, checked before any model is loaded."""

import dataclasses
import functools
import importlib
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from align_jax import data, rl, worlds
from align_jax.errors import InputError
from align_jax.phases import records, workspace
from align_jax.rl import numbers, rewards, rollouts, verifiers
from align_jax.rl.rollouts import Rollout

# What each kind reads besides `kind` and `weight`; every other setting must be left at None.
USES: dict[str, tuple[str, ...]] = {
  "model": ("source", "standardise"),  # a reward model
  "ensemble": ("source", "standardise", "combine", "variance_coef"),  # of reward models
  "gold": (),  # the microworld's judge
  "function": ("source",),  # any Python function (prompts, responses) -> [B]
  "length": ("target",),  # the number of tokens, or how near it is to a target
  "exact": ("field",),
  "numeric": ("field", "where", "tolerance"),
  "choice": ("field", "letters"),
  "regex": ("field", "text"),
  "contains": ("field", "text"),
  "starts_with": ("field", "text"),
  "ends_with": ("field", "text"),
  "words": ("at_least", "at_most"),
  "sentences": ("at_least", "at_most"),
  "lower": (),
  "upper": (),
  "no_commas": (),
  "json": (),
}
KINDS = tuple(USES)
_PASSED_ON = ("where", "tolerance", "letters", "at_least", "at_most")  # to the verifier, if given


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """One term of the score. Verifiers give 1 or 0; rl.verifiers says what each of them accepts."""

  kind: str  # one of KINDS
  weight: float = 1.0  # 0: only logged
  # model: its workdir (None: config.reward_model), or "average:..." of several; ensemble: the workdir of
  # one, or of several models "a,b,c"; function: "module:name"
  source: str | None = None
  # responses of the starting policy over which a reward model has mean 0 and deviation 1; OAI 256
  standardise: int | None = None
  combine: str | None = None  # ensemble: mean, min or uwo, the last two of standardised members
  variance_coef: float | None = None  # uwo: lambda; Coste 0.5 for best-of-n, 0.1 for PPO
  field: str | None = (
    None  # the column with the reference; exact, numeric, choice: None is "answer"
  )
  text: str | None = None  # regex, contains, starts_with, ends_with: instead of field, one for all
  where: str | None = None  # numeric: last (None), marked or only
  tolerance: float | None = None  # numeric: None is 1e-6
  letters: str | None = None  # choice: None is "ABCD"
  at_least: int | None = None  # words, sentences
  at_most: int | None = None
  target: int | None = None  # length: tokens; None gives the number of tokens itself

  def __post_init__(self):
    if self.kind not in KINDS:
      raise InputError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
    for name in (f.name for f in dataclasses.fields(self)):
      if name not in ("kind", "weight", *USES[self.kind]) and getattr(self, name) is not None:
        raise InputError(f"{name} is not used by a reward of kind {self.kind!r}: leave it at None")
    if "text" in USES[self.kind] and (self.text is None) == (self.field is None):
      raise InputError(f"a reward of kind {self.kind!r} needs text or field, and not both")
    self._check_models()
    self._check_ranges()

  def _check_models(self):
    if self.kind == "function":
      imported(self.source)
    if self.standardise is not None and self.standardise < 2:
      raise InputError(f"standardise takes at least 2 responses, not {self.standardise}")
    if self.kind != "ensemble":
      return
    if not self.sources or len(set(self.sources)) < len(self.sources):
      raise InputError(
        "an ensemble's source must name the workdir of one, or two workdirs or more, each once: 'a,b,c'"
      )
    if self.combine not in rewards.ENSEMBLES:
      raise InputError(
        f"combine must be one of {', '.join(rewards.ENSEMBLES)}, not {self.combine!r}"
      )
    if self.combine != "mean" and self.standardise is None:
      raise InputError(
        f"combine={self.combine!r} compares members, whose offsets are arbitrary: set standardise"
      )
    if (self.combine == "uwo") != (self.variance_coef is not None) or (self.variance_coef or 0) < 0:
      raise InputError("variance_coef is for combine='uwo': needed there, never negative")

  def _check_ranges(self):
    if self.where is not None and self.where not in numbers.WHERE:
      raise InputError(f"where must be one of {', '.join(numbers.WHERE)}, not {self.where!r}")
    if self.tolerance is not None and not 0 <= self.tolerance < 1:
      raise InputError(f"tolerance must be in [0, 1), not {self.tolerance}")
    letters = self.letters or "AB"
    if not letters.isalpha() or not 1 < len(set(letters)) == len(letters):
      raise InputError(f"letters must be two or more different letters, not {self.letters!r}")
    if self.kind in ("words", "sentences"):
      low = 1 if self.at_least is None else self.at_least
      high = low if self.at_most is None else self.at_most
      if self.at_least is self.at_most is None or not 1 <= low <= high:
        raise InputError("at_least and at_most: give one or both, with 1 <= at_least <= at_most")
    if self.target is not None and self.target < 1:
      raise InputError(f"target must be at least 1 token, not {self.target}")

  @property
  def sources(self) -> tuple[str, ...]:
    return tuple(part.strip() for part in (self.source or "").split(",") if part.strip())

  @property
  def reference(self) -> str | None:
    """The entry of a prompt's meta that holds the reference; None where there is none."""
    if self.kind in verifiers.REFERENCED and self.text is None:
      return self.field or "answer"
    return None


def imported(source: str | None) -> Callable[[Sequence[Any], Sequence[str]], Any]:
  """The function "module:name", `(prompts, responses) -> [B]`."""
  module, _, name = (source or "").partition(":")
  if not module or not name:
    raise InputError(f"a reward function's source is written 'module:name', not {source!r}")
  try:
    function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
  except (ImportError, AttributeError) as error:
    raise InputError(f"reward function {source!r}: {error}") from error
  if not callable(function):
    raise InputError(f"reward function {source!r} is not a function but {function!r}")
  return function


def check(
  configs: dict[str, RewardConfig],
  prompts: Sequence[data.Prompt],
  *,
  prompts_source: str,
  reward_model: str | None,
) -> None:
  """Raises InputError for anything that can be known to fail without a model in memory.

  A prompt without the reference that a verifier reads, or with one that it cannot use, is named by file,
  line and field.
  """
  if not configs:
    raise InputError("config.rewards must name at least one reward")
  for name, config in configs.items():
    if config.kind == "gold" and not records.is_world(prompts_source):
      raise InputError(f"config.rewards.{name}: kind 'gold' judges microworld prompts only")
    sources = _workdirs(config, reward_model, name)
    for source in sources:
      for workdir in source.removeprefix(workspace.AVERAGE).split(","):
        if not (pathlib.Path(workdir) / "model.json").exists():
          raise InputError(f"config.rewards.{name}: {workdir} is not the workdir of a reward model")
    if config.kind == "ensemble" and len(sources) == 1 and workspace.member_count(sources[0]) < 2:
      raise InputError(
        f"config.rewards.{name}: {sources[0]} is one reward model: name an ensemble, or two or more"
      )
    if config.kind in verifiers.REFERENCED:
      _check_references(name, config, prompts)


def _check_references(name: str, config: RewardConfig, prompts: Sequence[data.Prompt]) -> None:
  """Lets the verifier read every reference once."""
  function = verified(name, config).function
  shown = prompts if config.reference else prompts[:1]
  for prompt in shown:
    try:
      function(Rollout([prompt], ["a response"], None))
    except re.error as error:
      where = f"{prompt.source}: field '{config.reference}'" if config.reference else "text"
      raise InputError(
        f"config.rewards.{name}: {where} is no regular expression: {error}"
      ) from error
    except (InputError, ValueError) as error:
      raise InputError(f"config.rewards.{name}: {error}") from error


def verified(name: str, config: RewardConfig) -> rl.Reward:
  """The reward of a verifier's kind."""
  options = {k: getattr(config, k) for k in _PASSED_ON if getattr(config, k) is not None}
  function = functools.partial((verifiers.REFERENCED | verifiers.FORMATS)[config.kind], **options)
  if config.text is not None:
    function = functools.partial(_with_text, function, config.text)
  return rewards.verified_reward(name, function, field=config.reference, weight=config.weight)


def _with_text(function, text: str, response: str) -> bool:
  return function(response, text)


def _workdirs(config: RewardConfig, reward_model: str | None, name: str) -> tuple[str, ...]:
  """The reward models that a term reads."""
  if config.kind == "ensemble":
    return config.sources
  if config.kind != "model":
    return ()
  if (config.source or reward_model) is None:
    raise InputError(f"config.rewards.{name}: set source, or config.reward_model, to a workdir")
  return (config.source or reward_model,)


def build(
  configs: dict[str, RewardConfig],
  *,
  prompts_source: str,
  reward_model: str | None,
  policy: workspace.Loaded,
  mesh,
  dtype: str,
  reference: Callable[[int], Rollout] | None = None,
) -> tuple[list[rl.Reward], dict[str, workspace.Loaded]]:
  """(rewards in the order of `configs`, the reward models they use by workdir, `reward_model` first).

  What can fail without a model in memory is `check`ed by the caller, before it loads any.

  Args:
    configs: the terms by name.
    prompts_source: where the prompts are from; the gold judge must know the world.
    reward_model: workdir of what a term of kind "model" without a source means. It is loaded, once,
      whether or not a term reads it: the value model starts from it.
    policy: must have the reward models' vocabulary.
    mesh: of the run.
    dtype: of the reward models' activations.
    reference: n -> a rollout of n responses of the starting policy, for `standardise`.
  """
  judges: dict[str, workspace.Loaded] = {}
  members: dict[str, tuple[workspace.Loaded, ...]] = {}

  def load_members(workdir: str) -> tuple[workspace.Loaded, ...]:
    if workdir not in members:
      members[workdir] = workspace.load_members(workdir, mesh, dtype=dtype)
      judges[workdir] = _checked(members[workdir][0], policy, workdir)
    return members[workdir]

  def load(workdir: str) -> workspace.Loaded:
    judges[workdir] = workspace.mean_model(load_members(workdir), workdir)
    return judges[workdir]

  if reward_model is not None:
    load(reward_model)
  references = _Remembered(reference)
  terms: list[rl.Reward] = []
  for name, config in configs.items():
    sources = _workdirs(config, reward_model, name)
    if config.kind == "ensemble":
      found = [judge for workdir in sources for judge in load_members(workdir)]
    else:
      found = [load(workdir) for workdir in sources]
    of_term = [_member(name, judge, config, references, mesh) for judge in found]
    terms += _terms(name, config, of_term, prompts_source)
  return terms, judges


def _checked(judge: workspace.Loaded, policy: workspace.Loaded, workdir: str) -> workspace.Loaded:
  if judge.head is None:
    raise InputError(f"{workdir} is not a reward model")
  workspace.same_vocabulary(policy, judge, workdir)
  return judge


class _Remembered:
  """A reference rollout of each size, sampled once."""

  def __init__(self, sample: Callable[[int], Rollout] | None):
    self._sample, self._rollouts = sample, {}

  def __call__(self, n: int) -> Rollout:
    if self._sample is None:
      raise InputError("standardise needs responses of a starting policy: there is none here")
    if n not in self._rollouts:
      self._rollouts[n] = self._sample(n)
    return self._rollouts[n]


def _member(name, judge: workspace.Loaded, config: RewardConfig, references, mesh) -> rl.Reward:
  weights = {"trunk": judge.params, "head": judge.head}
  reward = rl.model_reward(name, judge.model, weights, mesh=mesh)
  if config.standardise is None:
    return reward
  return rewards.standardised(reward, references(config.standardise))


def _terms(name, config: RewardConfig, members, prompts_source: str) -> Sequence[rl.Reward]:
  weight = config.weight
  if config.kind == "model":
    return (dataclasses.replace(members[0], weight=weight),)
  if config.kind == "ensemble":
    return rewards.ensemble_reward(
      name, members, combine=config.combine, variance_coef=config.variance_coef, weight=weight
    )
  if config.kind == "gold":
    world = worlds.Microworld(seed=records.parse_world(prompts_source).seed)
    return (rl.text_reward(name, world.gold_rewards, weight=weight),)
  if config.kind == "function":
    return (rl.text_reward(name, imported(config.source), weight=weight),)
  if config.kind == "length":
    return (rewards.length_reward(name, target=config.target, weight=weight),)
  return (verified(name, config),)


def reference_rollouts(
  loaded: workspace.Loaded,
  prompts: Sequence[data.Prompt],
  *,
  max_length: int,
  sampling: rl.SamplingConfig,
  seed: int,
  mesh,
) -> Callable[[int], Rollout]:
  """n -> one response of `loaded` to each of n prompts: what rewards are standardised over."""

  def sample(n: int) -> Rollout:
    batches = data.prompt_batches(
      prompts, loaded.tokenizer, length=max_length, batch_size=n, seed=seed
    )
    return rollouts.sample_rollout(
      loaded.model,
      {"params": loaded.params},
      next(iter(batches)),
      prompts,
      loaded.tokenizer,
      rng=jax.random.key(seed),
      sampling=dataclasses.replace(sampling, samples_per_prompt=1),
      eos_ids=data.stop_ids(loaded.tokenizer),
      mesh=mesh,
    )

  return sample
