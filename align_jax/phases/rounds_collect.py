"""One round's pairs: the current policy answers fresh prompts, and a labeller chooses among the answers."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from align_jax import data, sampling, worlds
from align_jax.errors import InputError
from align_jax.evals import policy as policy_lib
from align_jax.evals import results, rounds
from align_jax.phases import evaluate, records, sections, workspace

PAIRINGS = ("random", "best_worst")


@dataclasses.dataclass(frozen=True)
class PromptsSection:
  """Where prompts come from; every round takes `per_round` that no earlier round has seen."""

  source: str  # "microworld:n=...", a file, a folder, hf:org/name:split
  per_round: int
  max_length: int  # tokens; a longer prompt is left out
  columns: str | None = None
  chat: bool = True  # plain-text prompts are wrapped in the chat template


@dataclasses.dataclass(frozen=True)
class SamplingSection:
  """How the current policy answers."""

  max_new_tokens: int
  samples_per_prompt: int = 2
  temperature: float = 1.0
  batch_size: int = 128  # responses decoded at a time

  def __post_init__(self):
    if self.samples_per_prompt < 2 or self.batch_size < self.samples_per_prompt:
      raise InputError(
        "sampling.samples_per_prompt must be at least 2, and batch_size no smaller than that"
      )
    if self.temperature <= 0:
      raise InputError("sampling.temperature must be positive: greedy answers are all the same")


@dataclasses.dataclass(frozen=True)
class LabellerSection:
  """Who chooses: P(a over b) = flip + (1 - 2 flip) sigmoid((u_a - u_b) / temperature).

  u is the gold reward with the biases of `worlds.Labeller`, or a reward model's reward. Among more than
  two answers the choice is Plackett and Luce's, of which that is the two-answer case.
  """

  judge: str = "gold"  # the microworld's, or "reward:<workdir of a reward model>"
  temperature: float = 0.68  # 0: always the one with the higher u
  length_bias: float = 0.0  # gold only; reward units a word
  agreement_bias: float = 0.0  # gold only; for going along with the user
  flip: float = 0.0  # chance of a slip of the hand
  pairs: str = "random"  # two different answers; or "best_worst" of all of them
  drop_ties: bool = False  # a labeller who may say that two are equal
  cut: str = "drop"  # or "keep": answers that max_new_tokens cut, which would be taught as ended

  def __post_init__(self):
    sections.check_one_of("labeller.pairs", self.pairs, PAIRINGS)
    sections.check_one_of("labeller.cut", self.cut, ("drop", "keep"))
    if self.judge != "gold" and not self.reward_model:
      raise InputError(
        f"config.labeller.judge must be 'gold' or 'reward:<workdir>', not {self.judge!r}"
      )
    if self.reward_model and (self.length_bias or self.agreement_bias):
      raise InputError("config.labeller: biases are not used by a reward model, which has its own")
    if self.temperature < 0 or not 0 <= self.flip <= 0.5:
      raise InputError("config.labeller: temperature must be at least 0, and flip within [0, 0.5]")

  @property
  def reward_model(self) -> str:
    """The workdir of the reward model that judges; empty for the gold judge."""
    return self.judge.removeprefix("reward:") if self.judge.startswith("reward:") else ""


def read_prompts(section: PromptsSection, tokenizer, count: int, seed: int) -> list[data.Prompt]:
  """`count` prompts in an order drawn by `seed`, which the rounds take one after the other."""
  found = records.read(section.source, "prompts", columns=section.columns, chat=section.chat)
  order = np.random.default_rng(seed).permutation(len(found))
  fitting = []
  for place in order:
    tokens = data.encode_prompt(found[place], tokenizer, section.max_length, "drop")
    if tokens is not None:
      fitting.append(found[place])
    if len(fitting) == count:
      return fitting
  raise InputError(
    f"config.prompts: {section.source} has {len(fitting)} prompts of at most {section.max_length} "
    f"tokens, but the rounds need {count}: no prompt is used twice"
  )


def sample(
  policy: workspace.Loaded, prompts: Sequence[data.Prompt], section: SamplingSection, *,
  seed: int, number: int, max_prompt_length: int, file: pathlib.Path, mesh,
) -> None:  # fmt: skip
  """Writes every prompt with its answers; sample g of prompt p depends on (seed, round, p, g) alone."""
  tokens = [data.encode_prompt(p, policy.tokenizer, max_prompt_length) for p in prompts]
  samples = sampling.generate(
    policy.model,
    policy.params,
    tokens,
    max_new_tokens=section.max_new_tokens,
    samples_per_prompt=section.samples_per_prompt,
    temperature=section.temperature,
    rng=jax.random.fold_in(jax.random.key(seed), number),
    eos_ids=data.stop_ids(policy.tokenizer),
    pad_id=data.pad_id(policy.tokenizer),
    mesh=mesh,
    batch_size=section.batch_size,
  )
  texts = sampling.decode_texts(samples, policy.tokenizer)
  answers = [
    {"text": text, "tokens": row.tolist(), "finished": bool(finished)}
    for text, row, finished in zip(texts, samples.responses(), samples.finished)
  ]
  size = section.samples_per_prompt
  write_rows(
    file,
    (
      {"prompt": list(prompt.prompt), "source": prompt.source, "responses": answers[at : at + size]}
      for prompt, at in zip(prompts, range(0, len(answers), size))
    ),
  )


@dataclasses.dataclass(frozen=True)
class Answers:
  """What `sample` wrote: P prompts with G answers each, and the rows as they were sampled."""

  prompts: Sequence[data.Prompt]
  rows: list[list[dict]]  # [P][G] of text, tokens, finished
  samples: sampling.Samples  # [P * G]

  @classmethod
  def read(cls, file: pathlib.Path, prompts: Sequence[data.Prompt], tokenizer, length: int):
    rows = [row["responses"] for _, row in results.read_lines(file)]
    heads = [data.encode_prompt(p, tokenizer, length) for p in prompts]
    return cls(prompts, rows, _as_samples(heads, rows, data.pad_id(tokenizer)))

  @property
  def texts(self) -> list[str]:
    return [answer["text"] for group in self.rows for answer in group]

  @property
  def repeated_prompts(self) -> list[data.Prompt]:
    """[P * G], the prompt of every answer."""
    return [prompt for prompt, group in zip(self.prompts, self.rows) for _ in group]


def _as_samples(heads: list[np.ndarray], rows: list[list[dict]], pad_id: int) -> sampling.Samples:
  answers = [(head, answer) for head, group in zip(heads, rows) for answer in group]
  width = max(len(head) + len(answer["tokens"]) for head, answer in answers)
  width = -(-width // 16) * 16  # few shapes, few programs
  tokens = np.full((len(answers), width), pad_id, np.int32)
  mask = np.zeros(tokens.shape, bool)
  for row, (head, answer) in enumerate(answers):
    end = len(head) + len(answer["tokens"])
    tokens[row, :end] = [*head, *answer["tokens"]]
    mask[row, len(head) : end] = True
  return sampling.Samples(
    tokens,
    np.array([len(head) for head, _ in answers], np.int32),
    mask,
    np.zeros(tokens.shape, np.float32),
    np.array([answer["finished"] for _, answer in answers]),
  )


def reward_scores(answers: Answers, init: str, settings: evaluate.EvaluateConfig, tokenizer, mesh):
  """[P * G] rewards by the reward model at `init`."""
  loaded = workspace.load(init, mesh, dtype=settings.dtype)
  if loaded.tokenizer.get_vocab() != tokenizer.get_vocab():
    raise InputError(f"{init} has another vocabulary than the policy: it cannot score its tokens")
  responses = policy_lib.Responses(tuple(answers.texts), answers.samples)
  return evaluate.reward_scorer(loaded, settings)(answers.repeated_prompts, responses)


def utilities(
  section: LabellerSection, judgements: Sequence[worlds.Judgement] | None, judged: np.ndarray | None
) -> np.ndarray:
  """[P * G], what the labeller likes: of the gold judge's judgements, or the reward model's rewards."""
  if section.reward_model:
    return np.asarray(judged, np.float64)
  labeller = worlds.Labeller(length_bias=section.length_bias, agreement_bias=section.agreement_bias)
  return np.array([labeller.utility(judgement) for judgement in judgements], np.float64)


def choose(
  texts: Sequence[str],
  finished: Sequence[bool],
  utility: np.ndarray,
  section: LabellerSection,
  rng: np.random.Generator,
) -> tuple[int, int] | str:
  """(chosen, rejected) among G answers to one prompt, or why there is no pair (`rounds.DROPS`)."""
  count = len(texts)
  noise, order, slip = rng.gumbel(size=count), rng.permutation(count), rng.random() < section.flip
  usable: dict[str, int] = {}  # text -> the first of the answers that say it
  for i in order:
    if finished[i] or section.cut == "keep":
      usable.setdefault(texts[i], int(i))
  different = list(usable.values())
  if len(different) < 2:
    return "identical" if len(set(texts)) < 2 else "cut"
  if section.pairs == "random":
    different = different[:2]
  # Gumbel noise on u / T: the higher of two is the first with probability sigmoid((u - u') / T).
  scale = section.temperature
  ranked = sorted(
    different, key=lambda i: (utility[i] / scale + noise[i],) if scale else (utility[i], noise[i])
  )
  rejected, chosen = ranked[0], ranked[-1]
  if section.drop_ties and abs(utility[chosen] - utility[rejected]) <= 1e-6:
    return "tied"
  return (rejected, chosen) if slip else (chosen, rejected)


def label(
  answers: Answers,
  section: LabellerSection,
  *,
  seed: int,
  number: int,
  judge: Callable[[data.Prompt, str], worlds.Judgement] | None,
  rewards: Mapping[str, np.ndarray],
  judged: np.ndarray | None,
  file: pathlib.Path,
) -> rounds.Collection:
  """Writes the pairs in the house's preference format, with what is known of them, and describes them.

  judge: of the world, where there is one. rewards: reward model -> [P * G]. judged: [P * G] of the
  reward model that is the labeller, if it is one.
  """
  pairs = zip(answers.repeated_prompts, answers.texts)
  judgements = [judge(prompt, text) for prompt, text in pairs] if judge else None
  scores = dict(rewards)
  if judgements is not None:
    scores["gold"] = np.array([judgement.reward for judgement in judgements])
  size = len(answers.rows[0])
  liked = utilities(section, judgements, judged).reshape(-1, size)
  choices = [
    choose(
      [answer["text"] for answer in group],
      [answer["finished"] for answer in group],
      liked[row],
      section,
      np.random.default_rng((seed, number, row)),
    )
    for row, group in enumerate(answers.rows)
  ]
  by_row = {name: np.asarray(x, float).reshape(-1, size) for name, x in scores.items()}
  families = [prompt.meta.get("family", "all") for prompt in answers.prompts]
  described = rounds.collection(
    number, _responses(answers, by_row), choices, [str(family) for family in families]
  )
  write_rows(file, _rows(answers, choices, by_row, families, number))
  return described


def _responses(answers: Answers, scores: Mapping[str, np.ndarray]) -> list[list[rounds.Response]]:
  return [
    [
      rounds.Response(
        answer["text"], len(answer["tokens"]), {name: x[row, i] for name, x in scores.items()}
      )
      for i, answer in enumerate(group)
    ]
    for row, group in enumerate(answers.rows)
  ]


def _rows(answers: Answers, choices, scores: Mapping[str, np.ndarray], families, number: int):
  for row, choice in enumerate(choices):
    if isinstance(choice, str):
      continue
    prompt = answers.prompts[row]
    texts = [answers.rows[row][i]["text"] for i in choice]
    # What follows the record itself is for the reader: our own reader leaves it alone.
    yield data.to_row(data.Preference(prompt.prompt, *texts)) | {
      "source": f"round {number}, {prompt.source}, samples {choice[0]} and {choice[1]}",
      "family": families[row],
      "scores": {name: [round(float(x[row, i]), 4) for i in choice] for name, x in scores.items()},
    }


def write_rows(file: pathlib.Path, rows) -> None:
  """JSON Lines in one move: a killed run leaves no half of it."""
  text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
  results.write_text(file, text)
