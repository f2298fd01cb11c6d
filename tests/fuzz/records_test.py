"""Mangled data files: every row is a record, a clear refusal, or one that was counted as left out."""

import collections
import copy
import dataclasses
import datetime
import decimal
import gzip
import json
import logging
import math
import pathlib
import re
import tempfile
import zlib

import hypothesis
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from align_jax import data
from align_jax.data import benchmarks
from align_jax.errors import InputError
from tests.fuzz import fuzzing

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant:"
READERS = {  # kind -> (reader, valid rows)
  "demonstrations": (
    data.read_demonstrations,
    [{"messages": MESSAGES}, {"prompt": "a", "completion": "b", "weight": 2}, {"text": "c"}],
  ),
  "preferences": (
    data.read_preferences,
    [
      {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1, "label_prob": 0.7},
      {"prompt": "a", "chosen": "b", "rejected": "c", "labels": {"x": 1, "y": 0.5}},
      {"chosen": TRANSCRIPT + " b", "rejected": TRANSCRIPT + " c"},
      {"chosen": MESSAGES, "rejected": [MESSAGES[0], {"role": "assistant", "content": "no"}]},
    ],
  ),
  "feedback": (
    data.read_feedback,
    [{"prompt": "a", "completion": "b", "label": True}, {"messages": MESSAGES, "label": False}],
  ),
  "prompts": (
    data.read_prompts,
    [{"prompt": "a", "answer": 3}, {"prompt": MESSAGES[:1], "meta": {"k": 1}}, {"messages": MESSAGES}],
  ),
  "rankings": (
    data.read_rankings,
    [{"prompt": "a", "responses": ["b", "c"]}, {"prompt": "a", "responses": ["b", "c"], "ranks": [2, 1]}],
  ),
  "ratings": (
    data.read_ratings,
    [{"prompt": "a", "completion": "b", "ratings": {"help": 3, "truth": 0.5}, "weight": 0.5}],
  ),
  "pandalm": (
    lambda path, **k: data.read_preferences(path, columns="pandalm", **k),
    [{"instruction": "a", "input": "", "response1": "b", "response2": "c", "annotator1": 1,
      "annotator2": 0, "annotator3": 2}],
  ),
  "autoj": (
    lambda path, **k: data.read_preferences(path, columns="autoj", **k),
    [{"prompt": "a", "response 1": "b", "response 2": "c", "label": 1}],
  ),
  "alpaca_eval": (
    lambda path, **k: data.read_preferences(path, columns="alpaca_eval", **k),
    [{"instruction": "a", "output_1": "b", "output_2": "c", "preference": 1.3}],
  ),
  "oasst_rankings": (
    lambda path, **k: data.read_rankings(path, columns="oasst_rankings", **k),
    [{"prompt": "a", "history": [["b", "c"]], "ranked_outputs": ["d", "e"]}],
  ),
  "renamed": (
    lambda path, **k: data.read_demonstrations(
      path, columns={"prompt": ("instruction", "input"), "completion": "output"}, **k
    ),
    [{"instruction": "a", "input": "b", "output": "c"}],
  ),
}  # fmt: skip
BENCHMARKS = {
  "rewardbench": {"prompt": "a", "chosen": "b", "rejected": "c", "subset": "math-prm", "id": 3},
  "rewardbench2": {"prompt": "a", "chosen": ["b"], "rejected": ["c"], "subset": "Ties", "id": "ref:1"},
  "rm_bench": {"prompt": "a", "chosen": ["b"] * 3, "rejected": ["c"] * 3, "domain": "math"},
  "rmb": {"conversation": MESSAGES[:1], "best": "b", "losers": ["c"], "category": "Helpfulness/x"},
  "judgebench": {"question": "a", "response_A": "b", "response_B": "c", "label": "A>B",
                 "source": "mmlu-pro"},
  "llmbar": {"input": "a", "output_1": "b", "output_2": "c", "label": 1, "subset": "Natural"},
}  # fmt: skip
FOUND = collections.Counter()


@pytest.fixture(scope="module", autouse=True)
def folder():
  """One folder for all: a test that is drawn hundreds of times needs no folder of its own each."""
  with tempfile.TemporaryDirectory() as name:
    yield pathlib.Path(name)
  logging.getLogger("fuzz").info("%s", dict(FOUND))


def places(value, path=()):
  """Every path into nested lists and objects."""
  yield path
  if isinstance(value, dict | list):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
      yield from places(inner, (*path, key))


def put(value, path, new):
  """A copy with another value at the path; `new` None takes an object's field away."""
  value = copy.deepcopy(value)
  at = value
  for key in path[:-1]:
    at = at[key]
  if isinstance(at, dict) and new is DROP:
    del at[path[-1]]
  else:
    at[path[-1]] = None if new is DROP else new
  return value


DROP = object()


@st.composite
def mangled_rows(draw, valid):
  """Rows of which some are as they should be and some have a field dropped, replaced or added."""
  rows = []
  for row in draw(st.lists(st.sampled_from(valid), min_size=1, max_size=4)):
    for _ in range(draw(st.integers(0, 2))):
      paths = [path for path in places(row) if path]
      path = draw(st.sampled_from(paths)) if paths else ()
      kind = draw(st.sampled_from(["replace", "drop", "add", "misspell"]))
      if kind == "add" or not path:
        row = row | {draw(fuzzing.TEXTS): draw(fuzzing.VALUES)}
      elif kind == "misspell":
        row = {(k + "s" if k == path[0] else k): v for k, v in row.items()}
      else:
        row = put(row, path, DROP if kind == "drop" else draw(fuzzing.VALUES))
    rows.append(row)
  return rows


LINES = st.sampled_from(
  [b"", b"  ", b"{", b"[1]", b"null", b"7", b'"a"', b"\xff\xfe", b"\0\0\0", b'{"prompt": 1, "prompt": 2}']
  + [b"[" * 100_000, b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", b'{"a": ' + b"9" * 5000 + b"}"]
  + [b'{"prompt": "\\ud83d", "completion": "b"}', b"{'prompt': 1}", b"\xef\xbb\xbf{}", b'{"a\\nb": {}}']
)  # fmt: skip


@st.composite
def jsonl(draw, valid):
  """The bytes of a file: mangled rows, lines that are none, odd line ends, a BOM, cuts and flips."""
  lines = [json.dumps(row).encode() for row in draw(mangled_rows(valid))]
  for _ in range(draw(st.integers(0, 1))):
    lines.insert(draw(st.integers(0, len(lines))), draw(LINES))
  content = draw(st.sampled_from([b"\n", b"\r\n"])).join(lines)
  if draw(st.integers(0, 4)) == 0 and content:
    at = draw(st.integers(0, len(content) - 1))
    cut, other = draw(st.sampled_from([(1, b""), (1, b"\xff"), (0, b"\0"), (0, b'"'), (9**9, b"")]))
    content = content[:at] + other + content[at + cut :]
  return (b"\xef\xbb\xbf" if draw(st.integers(0, 5)) == 0 else b"") + content


def check(read, path, count=None):
  """One file: read strictly and with bad rows left out; nothing is lost, nothing else is raised."""
  try:
    found = read(str(path))
    FOUND["loaded"] += 1
    sound(found)
    assert count is None or len(found) == count
  except InputError as error:
    FOUND["refused"] += 1
    fuzzing.clear(error, str(path))
  skipped = []
  handler = logging.Handler()
  handler.emit = lambda record: skipped.append(record.getMessage())
  logging.getLogger().addHandler(handler)
  try:
    found = read(str(path), invalid="skip")
  except InputError as error:
    fuzzing.clear(error, str(path))
    return
  finally:
    logging.getLogger().removeHandler(handler)
  sound(found)
  left_out = 0
  if skipped:
    FOUND["skipped"] += 1
    assert len(skipped) == 1 and "\n" not in skipped[0]
    left_out, total = map(int, re.search(r"skipped (\d+) of (\d+) rows", skipped[0]).groups())
    assert total == left_out + len(found)
  assert count is None or count == left_out + len(found)


def sound(found):
  """What was let in can be used: finite numbers, encodable texts, a fingerprint, and a way back."""
  data.fingerprint(found)
  for record in found:
    row = data.to_row(record)
    json.dumps(row, ensure_ascii=False, default=str).encode()
    for name in ("weight", "margin", "label_prob"):
      assert math.isfinite(row.get(name, 0.0))
    assert 0 <= row.get("label_prob", 0) <= 1 and row.get("weight", 0) >= 0


def lines_of(content: bytes) -> int:
  return sum(bool(line.strip()) for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


@pytest.mark.parametrize("kind", READERS)
@fuzzing.tried(40)
@hypothesis.given(draw=st.data())
def test_json_lines(folder, kind, draw):
  read, valid = READERS[kind]
  content = draw.draw(jsonl(valid))
  path = folder / "rows.jsonl"
  path.write_bytes(content)
  check(read, path, lines_of(content))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@fuzzing.tried(20)
@hypothesis.given(draw=st.data())
def test_benchmark_files(folder, benchmark, draw):
  content = draw.draw(jsonl([BENCHMARKS[benchmark]]))
  path = folder / "benchmark.jsonl"
  path.write_bytes(content)
  try:
    items = benchmarks.read(benchmark, str(path))
    FOUND["loaded"] += 1
    assert len(items) == lines_of(content)
    assert all(item.key and item.unit for item in items) and benchmarks.fingerprints(items)
  except InputError as error:
    FOUND["refused"] += 1
    fuzzing.clear(error, str(path))


@fuzzing.tried(60)
@hypothesis.given(draw=st.data())
def test_damaged_gzip(folder, draw):
  """Cut, flipped or with something behind it: read to the end with every row, or refused."""
  rows = [{"prompt": f"{i * i * 7919}", "completion": str(i)} for i in range(200)]
  content = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), mtime=0)
  for _ in range(draw.draw(st.integers(0, 2))):
    at = draw.draw(st.integers(0, len(content)))
    cut, other = draw.draw(
      st.sampled_from([(9**9, b""), (1, b"\xff"), (1, b"\0"), (0, b"x"), (8, b"")])
    )
    content = content[:at] + other + content[at + cut :]
  content += draw.draw(st.sampled_from([b"", b"", b"\0" * 9, b"more", gzip.compress(b"{}")]))
  path = folder / "rows.jsonl.gz"
  path.write_bytes(content)
  check(data.read_demonstrations, path)
  try:
    whole = lines_of(gzip.decompress(content))
    check(data.read_demonstrations, path, whole)
  except (OSError, EOFError, zlib.error):
    with pytest.raises(InputError):
      data.read_demonstrations(str(path))


OFFSETS = b"\0\0\0\0\1\0\0\0\2\0\0\0"
COLUMNS = st.sampled_from(
  [
    pa.array(["a", "b"]),
    pa.array(["a", None]),
    pa.array([1, 2]),
    pa.array([0.5, math.nan]),
    pa.array([True, False]),
    pa.array([b"a", b"\xff"]),
    pa.array([datetime.datetime(2020, 1, 1), None]),
    pa.array([decimal.Decimal("1.5"), None]),
    pa.array([2**62, -(2**62)], pa.timestamp("ms")),
    pa.array([1, 2], pa.timestamp("ns")),
    pa.array([["a"], ["b", None]]),
    pa.array([{"role": "user", "content": "a"}, {"role": "x", "content": None}]),
    pa.array([MESSAGES, MESSAGES[:1]]),
    pa.array([[("k", 1.0)], []], pa.map_(pa.string(), pa.float64())),
    pa.array(["a", "b"]).dictionary_encode(),
    pa.nulls(2),
    pa.Array.from_buffers(pa.string(), 2, [None, *map(pa.py_buffer, (OFFSETS, b"\xff\xfe"))]),
  ]
)  # fmt: skip
NAMES = [
  "prompt",
  "chosen",
  "rejected",
  "completion",
  "label",
  "messages",
  "weight",
  "labels",
  "meta",
  "x",
]


@fuzzing.tried(100)
@hypothesis.given(draw=st.data())
def test_parquet_of_any_types(folder, draw):
  kind = draw.draw(st.sampled_from(["demonstrations", "preferences", "feedback", "prompts"]))
  names = draw.draw(st.lists(st.sampled_from(NAMES), max_size=5, unique=draw.draw(st.booleans())))
  table = pa.table([draw.draw(COLUMNS) for _ in names], names=names)
  path = folder / "rows.parquet"
  pa.parquet.write_table(table, path)
  check(READERS[kind][0], path, 2 if names else None)


@fuzzing.tried(60)
@hypothesis.given(draw=st.data())
def test_damaged_parquet(folder, draw):
  rows = [{"prompt": f"{i}", "completion": "yes" * i} for i in range(20)]
  path = folder / "rows.parquet"
  pa.parquet.write_table(pa.Table.from_pylist(rows), path, compression="none")
  content = path.read_bytes()
  at = draw.draw(st.integers(0, len(content) - 1))
  cut, other = draw.draw(
    st.sampled_from([(9**9, b""), (1, b"\xff"), (1, b"\0"), (0, b"x"), (8, b"")])
  )
  path.write_bytes(content[:at] + other + content[at + cut :])
  check(data.read_demonstrations, path)


MESSAGE_TEXTS = st.text(min_size=1, max_size=20).filter(str.strip)
TURNS = st.builds(
  lambda texts: tuple({"role": r, "content": t} for r, t in zip(("user", "assistant") * 3, texts)),
  st.lists(MESSAGE_TEXTS, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2),
)
WEIGHTS = st.floats(0, 1e300)
VOTES = st.dictionaries(MESSAGE_TEXTS, st.sampled_from([0.0, 0.5, 1.0]), max_size=3)
META = st.dictionaries(st.sampled_from(["answer", "level"]), st.integers() | st.text(), max_size=2)
ROUND_TRIPS = {
  data.Demonstration: st.builds(
    lambda turns, text, weight: data.Demonstration(
      (*turns, {"role": "assistant", "content": text}), weight
    ),
    TURNS, st.text(), WEIGHTS,
  ),
  data.Preference: st.builds(
    data.Preference, TURNS, st.text(), st.text(), st.floats(-1e300, 1e300), WEIGHTS,
    st.floats(0, 1), VOTES,
  ),
  data.Feedback: st.builds(data.Feedback, TURNS, st.text(), st.booleans(), WEIGHTS),
  data.Prompt: st.builds(data.Prompt, TURNS, META),
  data.Ranking: st.builds(
    lambda turns, texts, weight: data.Ranking(
      turns, tuple(texts), tuple(range(len(texts), 0, -1)), weight
    ),
    TURNS, st.lists(st.text(), min_size=2, max_size=4), WEIGHTS,
  ),
  data.Rating: st.builds(
    data.Rating, TURNS, st.text(),
    st.dictionaries(MESSAGE_TEXTS, st.floats(-1e300, 1e300), min_size=1, max_size=3), WEIGHTS,
  ),
}  # fmt: skip
READS = {
  data.Demonstration: data.read_demonstrations, data.Preference: data.read_preferences,
  data.Feedback: data.read_feedback, data.Prompt: data.read_prompts,
  data.Ranking: data.read_rankings, data.Rating: data.read_ratings,
}  # fmt: skip


@pytest.mark.parametrize("cls", ROUND_TRIPS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
@fuzzing.tried(15)
@hypothesis.given(draw=st.data())
def test_what_is_written_is_read_back(folder, cls, suffix, draw):
  found = draw.draw(st.lists(ROUND_TRIPS[cls], min_size=1, max_size=4))
  path = str(folder / f"back.{suffix}")
  data.write(path, found)
  back = READS[cls](path)
  assert [dataclasses.replace(r, source="") for r in back] == found
  assert data.fingerprint(back) == data.fingerprint(found)
