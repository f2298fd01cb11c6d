"""Benchmarks of reward models: their rows as prompts with answers that are known to be right or wrong.

Every format is the benchmark's own, as JSON Lines or Parquet; a row is checked once, here, and an
error names its file, line and field. `FORMATS` are the benchmarks by name:

  rewardbench   {"prompt", "chosen", "rejected", "subset"}; Lambert et al. 2024, 2403.13787
  rewardbench2  {"prompt", "chosen" [c], "rejected" [r], "subset", "id"}; Malik et al. 2025, 2506.01937
  rm_bench      {"prompt", "chosen" [3], "rejected" [3], "domain" or "file"}; Liu et al. 2024, 2410.16184
  rmb           {"conversation", "chosen", "rejected" | "best", "losers", "category"}; Zhou et al. 2024,
                2410.09893; also under the names of the authors' files ("bon_best", "loser_list"...)
  judgebench    {"question", "response_A", "response_B", "label", "source"}; Tan et al. 2024, 2410.12784
  llmbar        {"input", "output_1", "output_2", "label", "subset"}; Zeng et al. 2023, 2310.07641
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from align_jax.data import sources
from align_jax.data.rows import Row
from align_jax.data.transcripts import Message
from align_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Item:
  """One question of a benchmark: answers that are right, the best first, and answers that are wrong."""

  prompt: tuple[Message, ...]
  chosen: tuple[str, ...]
  rejected: tuple[str, ...]
  section: str  # the first division of the benchmark
  subset: str  # and the second; within a section
  id: str = ""
  source: str = ""

  @property
  def unit(self) -> str:
    """What is drawn and resampled as one: the prompt, or both prompts of a number among the ties."""
    kind, _, number = self.id.partition(":")
    if kind in ("ref", "tied"):
      return number
    return json.dumps([[m["role"], m["content"]] for m in self.prompt])

  @property
  def key(self) -> str:
    """A hash of what the item says: the same for two copies of it."""
    said = [[m["role"], m["content"]] for m in self.prompt], self.chosen, self.rejected
    return _sha256(json.dumps(said).encode())


# RewardBench's sections, and how much each subset counts within its own: the numbers of examples of the
# published set, but 984 for math-prm, which has 447, so that maths weighs as much as the six of code.
REWARDBENCH = {
  "Chat": {
    "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
    "mt-bench-med": 40,
  },
  "Chat Hard": {
    "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
  },
  "Safety": {
    "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
    "xstest-should-respond": 250, "donotanswer": 136,
  },
  "Reasoning": {
    "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164,
    "hep-python": 164, "hep-rust": 164,
  },
  "Prior Sets": {"anthropic_helpful": 1, "anthropic_hhh": 1, "shp": 1, "summarize": 1},
}  # fmt: skip
REWARDBENCH2 = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
RM_BENCH = {  # subset -> domain
  "chat": "chat", "math": "math", "code": "code", "safety-refuse": "safety",
  "safety-response": "safety",
}  # fmt: skip
JUDGEBENCH = {  # beginning of a source -> group
  "mmlu-pro": "knowledge", "livebench-reasoning": "reasoning", "livebench-math": "math",
  "livecodebench": "coding",
}  # fmt: skip
RMB = ("pairs", "best of n")
LLMBAR = ("Neighbor", "GPTInst", "GPTOut", "Manual")  # the adversarial subsets


def read(benchmark: str, path: str) -> list[Item]:
  """The items of a benchmark's files: a file, a folder, or several of them joined by commas.

  InputError for an unknown benchmark, a file without rows, or a row that is not as its format says.
  """
  if benchmark not in FORMATS:
    raise InputError(f"no benchmark {benchmark!r} is known; known are {', '.join(FORMATS)}")
  parse = FORMATS[benchmark]
  return [parse(row) for part in path.split(",") for row in sources.rows(part.strip())]


def fingerprints(items: Sequence[Item]) -> dict[str, str | None]:
  """SHA-256 of every local file that the items are from, by name; None of a file of a hub."""
  files = dict.fromkeys(item.source.rpartition(":")[0] for item in items)
  return {
    name: None if name.startswith("hf:") else _sha256(pathlib.Path(name).read_bytes())
    for name in files
  }


def parse_rewardbench(row: Row) -> Item:
  subset = row.text("subset")
  section = next((name for name, subsets in REWARDBENCH.items() if subset in subsets), None)
  if section is None:
    known = ", ".join(name for subsets in REWARDBENCH.values() for name in subsets)
    raise row.error("subset", f"must be one of {known}, not '{subset}'")
  answers = (row.text("chosen"),), (row.text("rejected"),)
  return Item(_prompt(row, "prompt"), *answers, section, subset, _id(row, "id"), row.source)


def parse_rewardbench2(row: Row) -> Item:
  subset = row.choice("subset", {name: name for name in REWARDBENCH2})
  chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
  if row.number("num_correct", len(chosen)) != len(chosen):
    raise row.error("num_correct", f"is not the number of answers in 'chosen', {len(chosen)}")
  name = _id(row, "id")
  if subset == "Ties":
    kind, _, number = name.partition(":")
    if kind not in ("ref", "tied") or not number:
      raise row.error(
        "id", f"must be 'ref:<number>' or 'tied:<number>' of subset Ties, not '{name}'"
      )
  elif len(chosen) != 1:
    raise row.error("chosen", f"must be one answer outside subset Ties, not {len(chosen)}")
  return Item(_prompt(row, "prompt"), chosen, rejected, subset, subset, name, row.source)


def parse_rm_bench(row: Row) -> Item:
  name = "domain" if row.has("domain") or not row.has("file") else "file"
  subset = row.text(name).removesuffix("_filtered")
  if subset not in RM_BENCH:
    raise row.error(name, f"must be one of {', '.join(RM_BENCH)}, not '{subset}'")
  chosen, rejected = _texts(row, "chosen", 3), _texts(row, "rejected", 3)
  identity = _id(row, "id"), row.source
  return Item(_prompt(row, "prompt"), chosen, rejected, RM_BENCH[subset], subset, *identity)


def parse_rmb(row: Row) -> Item:
  upstream = row.has("conversation_input")
  names = _RMB_UPSTREAM if upstream else _RMB
  best_of = row.has(names["best"])
  path = row.text(names["category"]).split("/")
  path = path[1:] if path[0] in ("Pairwise_set", "BoN_set") else path
  if path[0] not in ("Helpfulness", "Harmlessness") or len(path) < 2:
    what = "must be Helpfulness/<scenario> or Harmlessness/<scenario>"
    raise row.error(names["category"], f"{what}, not '{'/'.join(path)}'")
  if best_of:
    losers = row.required(names["losers"])
    if not isinstance(losers, list | tuple) or not losers:
      raise row.error(names["losers"], "must be a list of one answer or more")
    chosen = (_answer(row, names["best"], row.fields[names["best"]]),)
    rejected = tuple(_answer(row, f"{names['losers']}[{i}]", x) for i, x in enumerate(losers))
  else:
    chosen, rejected = (
      (_answer(row, name, row.required(name)),) for name in (names["chosen"], names["rejected"])
    )
  section = f"{path[0]}, {RMB[best_of]}"
  identity = _id(row, names["best_id"] if best_of else names["pair_id"]), row.source
  prompt = _conversation(row, names["conversation"])
  return Item(prompt, chosen, rejected, section, "/".join(path[1:]), *identity)


def parse_judgebench(row: Row) -> Item:
  subset = row.text("source")
  group = next((group for name, group in JUDGEBENCH.items() if subset.startswith(name)), None)
  if group is None:
    raise row.error("source", f"must begin with one of {', '.join(JUDGEBENCH)}, not '{subset}'")
  first = row.choice("label", {"A>B": True, "B>A": False})
  answers = ((row.text("response_A"),), (row.text("response_B"),))
  return Item(
    _prompt(row, "question"),
    *_ordered(answers, first),
    group,
    subset,
    _id(row, "pair_id"),
    row.source,
  )


def parse_llmbar(row: Row) -> Item:
  path = row.text("subset").split("/")
  subset = path[-1]
  if "Adversarial" in path[:-1] and subset not in LLMBAR:
    raise row.error("subset", f"must end with one of {', '.join(LLMBAR)}, not '{subset}'")
  section = "Adversarial" if "Adversarial" in path[:-1] else subset
  first = row.choice("label", {1: True, 2: False})
  answers = ((row.text("output_1"),), (row.text("output_2"),))
  return Item(
    _prompt(row, "input"), *_ordered(answers, first), section, subset, _id(row, "i"), row.source
  )


FORMATS: dict[str, Callable[[Row], Item]] = {
  "rewardbench": parse_rewardbench,
  "rewardbench2": parse_rewardbench2,
  "rm_bench": parse_rm_bench,
  "rmb": parse_rmb,
  "judgebench": parse_judgebench,
  "llmbar": parse_llmbar,
}
_RMB = {
  "conversation": "conversation", "chosen": "chosen", "rejected": "rejected", "best": "best",
  "losers": "losers", "category": "category", "pair_id": "id", "best_id": "id",
}  # fmt: skip
_RMB_UPSTREAM = {
  "conversation": "conversation_input", "chosen": "chosen", "rejected": "reject", "best": "bon_best",
  "losers": "loser_list", "category": "category_path", "pair_id": "pair_uid", "best_id": "bon_uid",
}  # fmt: skip


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _prompt(row: Row, name: str) -> tuple[Message, ...]:
  """A string is one user message; a list is a conversation that ends with the user."""
  if not isinstance(row.fields.get(name), str):
    return _conversation(row, name)
  if not row.text(name).strip():
    raise row.error(name, "is empty")
  return ({"role": "user", "content": row.text(name)},)


def _conversation(row: Row, name: str) -> tuple[Message, ...]:
  """The messages of a field, without what else is noted of them (their language...)."""
  value = row.required(name)
  if isinstance(value, list | tuple):
    kept = ("role", "content")
    value = [{k: m.get(k) for k in kept} if isinstance(m, dict) else m for m in value]
  messages = Row(row.source, {name: value}).messages(name)
  if messages[-1]["role"] == "assistant":
    raise row.error(name, "must not end with an assistant turn")
  return messages


def _texts(row: Row, name: str, count: int | None = None) -> tuple[str, ...]:
  values = row.texts(name)
  if not values or len(values) != (count or len(values)):
    raise row.error(name, f"must be a list of {count or 'one or more'} answers, not {len(values)}")
  return values


def _answer(row: Row, name: str, value: Any) -> str:
  """A text, or the text of {"answer", "llm_name"}."""
  if isinstance(value, dict):
    name, value = f"{name}.answer", value.get("answer")
  return Row(row.source, {name: value}).text(name)


def _ordered(answers: tuple[Any, Any], first: bool) -> tuple[Any, Any]:
  return answers if first else answers[::-1]


def _id(row: Row, name: str) -> str:
  return str(row.fields.get(name, ""))
