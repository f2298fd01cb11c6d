"""Files, folders and the hub; what cannot be read is said with file and line ([45])."""

import gzip
import json
import logging

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet
import pytest

from align_jax import data
from align_jax.data import sources
from align_jax.errors import InputError

ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(3)]


def write(path, rows=ROWS):
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w")).write(text)
  return str(path)


def test_plain_zipped_and_parquet_rows_are_the_same(tmp_path):
  plain, zipped = write(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")
  with gzip.open(zipped, "wt") as file:
    file.write(open(plain).read())
  parquet = str(tmp_path / "c.parquet")
  pa.parquet.write_table(pa.Table.from_pylist(ROWS), parquet)
  read = {p: data.read_demonstrations(p) for p in (plain, zipped, parquet)}
  assert len({data.fingerprint(records) for records in read.values()}) == 1
  for path, records in read.items():
    assert [r.source for r in records] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_parquet_messages_with_unused_columns(tmp_path):
  rows = [{"messages": [{"role": "user", "content": "a", "name": None},
                        {"role": "assistant", "content": "b", "name": None}]}]  # fmt: skip
  path = str(tmp_path / "c.parquet")
  schema = pa.schema(
    {"messages": pa.list_(pa.struct({k: pa.string() for k in ("role", "content", "name")}))}
  )
  pa.parquet.write_table(pa.Table.from_pylist(rows, schema), path)
  (record,) = data.read_demonstrations(path)
  assert record.messages[1] == {"role": "assistant", "content": "b"}


def test_a_folder_is_its_files_in_order_of_name(tmp_path):
  (tmp_path / "sub").mkdir()
  write(tmp_path / "b.jsonl", ROWS[:1])
  write(tmp_path / "a.jsonl", ROWS[1:2])
  write(tmp_path / "sub" / "c.jsonl", ROWS[2:])
  (tmp_path / "NOTE.md").write_text("not data")
  records = data.read_demonstrations(str(tmp_path))
  assert [r.messages[0]["content"][-1] for r in records] == ["1", "0", "2"]


def test_blank_lines_do_not_shift_line_numbers(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text("\n" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1]))
  assert [r.source for r in data.read_demonstrations(str(path))] == [f"{path}:2", f"{path}:4"]


GOOD = json.dumps(ROWS[0]) + "\n"


@pytest.mark.parametrize(
  "name, content, complaint",
  [
    ("a.jsonl", GOOD + "{bad}\n", r"a.jsonl:2: invalid JSON \(.* at column 2\)"),
    ("a.jsonl", GOOD + "[1]\n", "a.jsonl:2: a row must be a JSON object, not list"),
    (
      "a.jsonl",
      GOOD + '{"prompt": "a", "prompt": "b"}\n',
      "a.jsonl:2: field 'prompt' appears twice",
    ),
    ("a.jsonl", "", "a.jsonl: the file is empty"),
    ("a.jsonl", "\n\n", "a.jsonl: the file is empty"),
    ("a.jsonl", GOOD.encode() + b"\xff\xfe\n", "a.jsonl:2: not UTF-8 text"),
    ("a.jsonl.gz", b"not zipped", r"a.jsonl.gz:1: the file cannot be read further \(Not a gzipped"),
    ("a.parquet", b"not parquet", "a.parquet:1: the file cannot be read further"),
    ("a.csv", "a,b", r"a.csv: unknown kind of file \(known: .jsonl,"),
    ("a.jsonl", GOOD + '{"prompt": "a"}', "a.jsonl:2: field 'completion' is missing"),
    (
      "a.jsonl",
      GOOD + '{"prompt": "a", "completion": "b", "weight": NaN}',
      "2: field 'weight' must be",
    ),
  ],
)
def test_a_bad_file_is_named_with_its_line(name, content, complaint, tmp_path):
  path = tmp_path / name
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(InputError, match=complaint):
    data.read_demonstrations(str(path))


def test_a_truncated_gzip_is_named_with_its_line(tmp_path):
  path = tmp_path / "a.jsonl.gz"
  rows = [{"prompt": f"{i * i * 7919}", "completion": str(i)} for i in range(3000)]
  whole = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(
    InputError, match=r"a.jsonl.gz:\d+: the file cannot be read further \(.*end-of"
  ):
    data.read_demonstrations(str(path))
  path.write_bytes(whole[:200] + bytes(50) + whole[250:])
  with pytest.raises(InputError, match=r"a.jsonl.gz:\d+: "):
    data.read_demonstrations(str(path))


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path):
  with pytest.raises(InputError, match="nowhere.jsonl: no such file or folder"):
    data.read_prompts(str(tmp_path / "nowhere.jsonl"))
  with pytest.raises(InputError, match="the folder holds no .jsonl"):
    data.read_prompts(str(tmp_path))


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path, caplog):
  path = write(tmp_path / "a.jsonl", [ROWS[0], {"prompt": "a"}, ROWS[1]])
  with caplog.at_level(logging.WARNING):
    assert len(data.read_demonstrations(path, invalid="skip")) == 2
  assert "skipped 1 of 3 rows; first: " in caplog.text and "a.jsonl:2: field" in caplog.text
  with pytest.raises(InputError, match="no valid rows"):
    data.read_demonstrations(write(tmp_path / "b.jsonl", [{"prompt": "a"}]), invalid="skip")
  with pytest.raises(InputError, match="invalid must be 'raise' or 'skip'"):
    data.read_demonstrations(path, invalid="ignore")


def test_foreign_columns(tmp_path):
  names = ("instruction", "input", "output", "chosen", "rejected")
  values = (("Add.", "1 2", "3", "3", "4"), ("Hi.", "", "Ho.", "Ho.", "No."))
  rows = [dict(zip(names, row)) for row in values]
  path = write(tmp_path / "a.jsonl", rows)
  prompts = ["Add.\n1 2", "Hi."]
  for columns in ("alpaca", {"prompt": ("instruction", "input"), "completion": "output"}):
    records = data.read_demonstrations(path, columns=columns)
    assert [r.messages[0]["content"] for r in records] == prompts
    assert [r.messages[1]["content"] for r in records] == ["3", "Ho."]
  pairs = data.read_preferences(path, columns={"prompt": ("instruction", "input")})
  assert [r.prompt[0]["content"] for r in pairs] == prompts
  swapped = data.read_preferences(
    path, columns={"prompt": "instruction", "chosen": "rejected", "rejected": "chosen"}
  )
  assert [r.chosen for r in swapped] == ["4", "No."]


def test_a_column_map_is_checked(tmp_path):
  path = write(tmp_path / "a.jsonl")
  with pytest.raises(InputError, match=r"no column map 'alpacca' \(known: alpaca"):
    data.read_demonstrations(path, columns="alpacca")
  with pytest.raises(InputError, match="columns: 'promt' is not one of our fields"):
    data.read_demonstrations(path, columns={"promt": "prompt"})
  with pytest.raises(InputError, match="a.jsonl:1: field 'completion' is missing"):
    data.read_demonstrations(path, columns={"completion": "output"})


def test_prompts_carry_named_columns(tmp_path):
  """A reference answer travels with its prompt; one that is missing is said with file and line."""
  rows = [{"question": f"{i} + 1?", "solution": f"#### {i + 1}", "id": i} for i in range(3)]
  path = write(tmp_path / "a.jsonl", rows)
  columns = {"prompt": "question", "answer": "solution", "both": ("question", "solution")}
  prompts = data.read_prompts(path, columns=columns)
  assert [p.prompt[0]["content"] for p in prompts] == ["0 + 1?", "1 + 1?", "2 + 1?"]
  assert prompts[1].meta == {"answer": "#### 2", "both": "1 + 1?\n#### 2", "id": 1}
  for hole in ({"question": "?"}, {"question": "?", "solution": None}):
    path = write(tmp_path / "b.jsonl", [*rows, hole])
    with pytest.raises(InputError, match="b.jsonl:4: field 'solution' is missing"):
      data.read_prompts(path, columns=columns)
    assert len(data.read_prompts(path, columns=columns, invalid="skip")) == 3


@pytest.mark.parametrize("name", ["promt", "Prompt", "messages ", "meta.answer", "my answer", ""])
def test_a_carried_name_must_be_a_name_and_no_misspelt_field(tmp_path, name):
  path = write(tmp_path / "a.jsonl")
  with pytest.raises(InputError, match=f"columns: '{name}' is not one of our fields"):
    data.read_prompts(path, columns={name: "completion"})


def test_only_prompts_carry_columns(tmp_path):
  path = write(tmp_path / "a.jsonl")
  for read in (data.read_demonstrations, data.read_preferences, data.read_feedback):
    with pytest.raises(InputError, match="columns: 'answer' is not one of our fields"):
      read(path, columns={"prompt": "prompt", "answer": "completion"})


class FakeHub:
  """A hub of one data set, whose files lie in a folder."""

  def __init__(self, folder):
    self.folder = folder

  def list_repo_files(self, repo, repo_type):
    if (repo, repo_type) != ("org/pairs", "dataset"):
      raise ConnectionError("repository not found")
    return sorted(str(f.relative_to(self.folder)) for f in self.folder.rglob("*") if f.is_file())

  def download(self, repo, file, repo_type):
    return str(self.folder / file)


@pytest.fixture
def hub(tmp_path, monkeypatch):
  for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
               "data/test-00000-of-00001.jsonl", "other/train.jsonl", "README.md"):  # fmt: skip
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write(path, [{"prompt": name, "completion": "x"}])
  fake = FakeHub(tmp_path)
  monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)


def test_a_hub_split_is_its_files(hub):
  records = data.read_demonstrations("hf:org/pairs/data:train")
  assert [r.source for r in records] == [
    f"hf:org/pairs/data/train-0000{i}-of-00002.jsonl:1" for i in (0, 1)
  ]
  assert len(data.read_demonstrations("hf:org/pairs:train")) == 3
  assert len(data.read_demonstrations("hf:org/pairs:test")) == 1


@pytest.mark.parametrize(
  "path, complaint",
  [
    ("hf:org/pairs:dev", "no file of split 'dev' among README.md, data/test-"),
    ("hf:org/none:train", r"the hub did not answer \(ConnectionError: repository not found\)"),
    ("hf:org/pairs", "a hub name is written hf:org/name:split"),
    ("hf:pairs:train", "a hub name is written hf:org/name:split"),
  ],
)
def test_hub_failures_are_one_sentence(path, complaint, hub):
  with pytest.raises(InputError, match=f"{path}: {complaint}"):
    data.read_demonstrations(path)


def test_our_fields_are_all_a_map_may_name():
  assert {name for columns in data.COLUMN_MAPS.values() for name in columns} <= set(sources.FIELDS)
