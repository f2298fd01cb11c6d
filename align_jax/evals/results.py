"""What an evaluation found, as frozen dataclasses that go to JSON and come back equal."""

import dataclasses
import json
import math
import pathlib
import uuid
from typing import Any

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals.statistics import CalibrationBin, Estimate, WinRate

RATES = ("correct", "harmful", "refused", "sycophantic")  # what a judge says of a response
_ESTIMATE_FIELDS = {field.name for field in dataclasses.fields(Estimate)}


@dataclasses.dataclass(frozen=True)
class Sample:
  """One prompt (a list of role/content messages), what the policy answered, and its score."""

  prompt: tuple[dict[str, str], ...]
  response: str
  score: float
  family: str


@dataclasses.dataclass(frozen=True)
class PolicyEvaluation:
  """A policy against a reference on the same prompts; scores, rates and KL carry their intervals.

  `kl` is the mean over sampled responses of Σ_t (log π - log π_ref), in nats a response (k1), and
  `kl_k3` the mean of Σ_t (r - 1 - log r), r = π_ref/π, of the same responses. Both are unbiased. k3
  varies less while the policy is near the reference, but far from it its mean lives on rare tokens
  that n samples miss, so the headline and the frontier use k1.
  """

  policy: str
  reference: str
  scorer: str
  n: int
  seed: int
  temperature: float
  max_new_tokens: int
  score: Estimate
  reference_score: Estimate
  score_gain: Estimate  # paired, item by item
  win_rate: WinRate
  kl: Estimate
  kl_k3: Estimate
  length: Estimate  # tokens, the one that ends the turn included
  reference_length: Estimate
  finished: Estimate  # share of responses that ended before max_new_tokens
  families: dict[str, dict[str, Estimate]]  # family -> score, length and the judge's rates
  kind: str = "policy"

  @property
  def is_reference(self) -> bool:
    """Whether this is the reference against itself, the row that the others are compared with."""
    return self.policy == self.reference and self.kl.value == 0.0

  @property
  def sqrt_kl(self) -> tuple[float, float, float]:
    """√KL of the k1 estimate and of its bounds, 0 where sampling noise made them negative."""
    return tuple(
      math.nan if math.isnan(kl) else math.sqrt(max(kl, 0.0))
      for kl in (self.kl.value, self.kl.low, self.kl.high)
    )


@dataclasses.dataclass(frozen=True)
class RewardEvaluation:
  """A reward model on held-out pairs, beside what any model could reach on such labels."""

  n: int
  accuracy: Estimate  # ties count half
  ceiling: Estimate | None  # how often the gold judge itself agrees with the labels
  gold_accuracy: Estimate | None  # the model against the gold preference, gold ties left out
  accuracy_chosen_longer: Estimate
  accuracy_chosen_shorter: Estimate
  longer_wins: Estimate  # the accuracy of preferring the longer response
  length_correlation: float | None  # Pearson's r of reward and length differences
  margin: Estimate  # reward(chosen) - reward(rejected)
  calibration_error: float
  brier: float
  calibration: tuple[CalibrationBin, ...]
  kind: str = "reward"


def save(
  folder: str | pathlib.Path,
  evaluation: PolicyEvaluation | RewardEvaluation,
  samples: tuple[Sample, ...] = (),
) -> None:
  """Writes evaluation.json, and samples.jsonl (one object a prompt) when there are samples."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  if samples:
    lines = (json.dumps(to_json(sample), allow_nan=False) + "\n" for sample in samples)
    write_text(folder / "samples.jsonl", "".join(lines))
  # Last, because its presence says that the evaluation is done.
  text = json.dumps(to_json(evaluation), indent=2, allow_nan=False)
  write_text(folder / "evaluation.json", text + "\n")


def load(folder: str | pathlib.Path) -> PolicyEvaluation | RewardEvaluation:
  """Reads evaluation.json; InputError that names the file and the field at fault."""
  file = pathlib.Path(folder) / "evaluation.json"
  values = read_json(file)
  kinds = {"policy": PolicyEvaluation, "reward": RewardEvaluation}
  kind = values.get("kind") if isinstance(values, dict) else None
  if kind not in kinds:
    raise InputError(f"{file}: field 'kind' must be one of {', '.join(kinds)}, not {kind!r}")
  return config_lib.build(kinds[kind], values, str(file), finite=False)


def load_samples(folder: str | pathlib.Path) -> tuple[Sample, ...]:
  """Reads samples.jsonl; InputError that names file, line and field."""
  file = pathlib.Path(folder) / "samples.jsonl"
  return tuple(
    config_lib.build(
      Sample, {"score": math.nan} | _without_nulls(row), f"{file}:{number}", finite=False
    )
    for number, row in read_lines(file)
  )


def read_json(file: pathlib.Path) -> Any:
  """The content of a JSON file, with a `null` inside an Estimate read as NaN."""
  try:
    return json.loads(file.read_text(), object_hook=_revive)
  except OSError as error:
    raise InputError(f"{file} cannot be read: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise InputError(f"{file} is not valid JSON: {error}") from error


def read_lines(file: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
  """The (line number, object) pairs of a JSON Lines file, without blank lines.

  A last line that is cut off is left out: a run that is going on has not finished writing it.
  """
  try:
    lines = file.read_text().split("\n")  # not splitlines: U+2028 is text
  except OSError as error:
    raise InputError(f"{file} cannot be read: {error.strerror}") from error
  rows = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      if number == len(lines):
        break
      raise InputError(f"{file}:{number}: invalid JSON: {error}") from error
    if not isinstance(row, dict):
      raise InputError(f"{file}:{number}: an object is needed, not {type(row).__name__}")
    rows.append((number, row))
  return rows


def to_json(value: Any) -> Any:
  """Dataclasses to dictionaries, tuples to lists, NaN to null: strict JSON, which has no NaN."""
  if dataclasses.is_dataclass(value):
    return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
  if isinstance(value, dict):
    return {key: to_json(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_json(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _revive(values: dict[str, Any]) -> dict[str, Any]:
  if _ESTIMATE_FIELDS <= values.keys():
    return {key: math.nan if item is None else item for key, item in values.items()}
  return values


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in row.items() if value is not None}


def write_text(file: pathlib.Path, text: str) -> None:
  """Replaces the file in one move: a reader finds the old text or the new one."""
  part = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.part")
  part.write_text(text)
  part.replace(file)
