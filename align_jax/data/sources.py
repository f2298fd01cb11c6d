"""Where rows come from: JSON Lines (or .gz), Parquet, folders of them, the Hugging Face hub."""

import codecs
import difflib
import gzip
import json
import logging
import pathlib
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from align_jax.data import formats
from align_jax.data.rows import Row
from align_jax.errors import InputError, one_line

T = TypeVar("T")
Columns = Mapping[str, str | tuple[str, ...]] | str | None

_DEEPEST = 100  # objects and lists inside each other
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
FIELDS = (
  "messages", "prompt", "completion", "text", "chosen", "rejected", "label", "margin", "weight",
  "label_prob", "labels", "meta", "responses", "ranks", "ratings",
)  # fmt: skip

# Our field -> their column, or columns whose texts are joined by a newline.
COLUMN_MAPS: dict[str, dict[str, str | tuple[str, ...]]] = {
  "alpaca": {"prompt": ("instruction", "input"), "completion": "output"},
  "response": {"completion": "response"},
  "question_answer": {"prompt": "question", "completion": "answer"},
  "conversation": {"prompt": "conversation"},
  "messages_as_prompt": {"prompt": "messages"},
}


def read(
  path: str,
  parse: Callable[[Row, bool], T],
  *,
  columns: Columns = None,
  chat: bool = True,
  invalid: str = "raise",
  carries: bool = False,
) -> list[T]:
  """Every row of `path`, parsed; a bad row raises InputError, or is counted (invalid="skip").

  carries: whether `columns` may give columns names of the user's own, which every row must have.
  """
  if invalid not in ("raise", "skip"):
    raise InputError(f"invalid must be 'raise' or 'skip', not '{invalid}'")
  ours = _reader_of(columns, carries)
  records, bad = [], []
  for row in rows(path, bad if invalid == "skip" else None):
    try:
      records.append(parse(ours(row), chat))
    except InputError as error:
      if invalid == "raise":
        raise
      bad.append(str(error))
  if bad:
    total = len(bad) + len(records)
    logging.warning("%s: skipped %d of %d rows; first: %s", path, len(bad), total, bad[0])
  if not records:
    raise InputError(f"{path}: no {'valid ' if bad else ''}rows")
  return records


def rows(path: str, bad: list[str] | None = None) -> Iterator[Row]:
  """The rows of a file, of every data file of a folder in order of name, or of a hub split.

  A line that is no row raises InputError, or leaves its complaint in `bad`; a file that cannot be read
  to its end always raises.
  """
  for name, file in _files(str(path)):
    count = 0
    for line, fields in _parquet(name, file) if file.suffix == ".parquet" else _jsonl(name, file):
      count += 1
      if not isinstance(fields, InputError):
        yield Row(f"{name}:{line}", fields)
      elif bad is None:
        raise fields
      else:
        bad.append(str(fields))
    if not count:
      raise InputError(f"{name}: the file is empty")


def _files(path: str) -> list[tuple[str, pathlib.Path]]:
  if path.startswith("hf:"):
    return _hub_files(path)
  local = pathlib.Path(path)
  if local.is_dir():
    files = sorted(f for f in local.rglob("*") if f.name.endswith(SUFFIXES))
    if not files:
      raise InputError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
    return [(str(f), f) for f in files]
  if not local.exists():
    raise InputError(f"{path}: no such file or folder")
  if not local.name.endswith(SUFFIXES):
    raise InputError(f"{path}: unknown kind of file (known: {', '.join(SUFFIXES)})")
  return [(path, local)]


def _hub_files(path: str) -> list[tuple[str, pathlib.Path]]:
  """hf:org/name[/folder]:split -> the split's files, downloaded to the hub's cache."""
  import huggingface_hub

  name, _, split = path.removeprefix("hf:").partition(":")
  parts = name.split("/")
  if len(parts) < 2 or not all(parts) or not split:
    raise InputError(f"{path}: a hub name is written hf:org/name:split or hf:org/name/folder:split")
  repo, folder = "/".join(parts[:2]), "/".join(parts[2:])
  try:
    listed = huggingface_hub.HfApi().list_repo_files(repo, repo_type="dataset")
    chosen = sorted(f for f in listed if f.endswith(SUFFIXES) and _in_split(f, folder, split))
    local = [huggingface_hub.hf_hub_download(repo, f, repo_type="dataset") for f in chosen]
  except Exception as error:  # of three libraries, by version; each means the same to the user
    raise InputError(f"{path}: the hub did not answer ({type(error).__name__}: {error})") from error
  if not chosen:
    raise InputError(f"{path}: no file of split '{split}' among {', '.join(listed) or 'none'}")
  return [(f"hf:{repo}/{f}", pathlib.Path(file)) for f, file in zip(chosen, local)]


def _in_split(file: str, folder: str, split: str) -> bool:
  """True of split.jsonl, split-00000-of-00003.parquet and split/any.jsonl inside the folder."""
  if folder and not file.startswith(folder + "/"):
    return False
  parts = file.removeprefix(folder + "/" if folder else "").split("/")
  stem = parts[-1].split(".")[0]
  return split in parts[:-1] or stem == split or stem.startswith(split + "-")


Fields = dict[str, Any] | InputError


def _jsonl(name: str, file: pathlib.Path) -> Iterator[tuple[int, Fields]]:
  line = 0
  try:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
      for line, text in enumerate(lines, start=1):
        text = text.removeprefix(codecs.BOM_UTF8) if line == 1 else text
        if text.strip():
          yield line, _object_or_error(f"{name}:{line}", text)
  except (OSError, EOFError, zlib.error) as error:
    raise _unreadable(f"{name}:{line + 1}", error) from error


def _unreadable(source: str, error: Exception) -> InputError:
  return InputError(f"{source}: the file cannot be read further ({one_line(error)})")


def _object_or_error(source: str, text: bytes) -> Fields:
  try:
    return _object(source, text)
  except InputError as error:
    return error


def _object(source: str, text: bytes) -> dict[str, Any]:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
      names = [key for key, _ in pairs]
      twice = next(key for key in names if names.count(key) > 1)
      raise InputError(f"{source}: field '{one_line(twice)}' appears twice")
    return fields

  try:
    fields = json.loads(text.decode(), object_pairs_hook=unique)
  except UnicodeDecodeError as error:
    raise InputError(f"{source}: not UTF-8 text ({error.reason})") from error
  except json.JSONDecodeError as error:
    raise InputError(f"{source}: invalid JSON ({error.msg} at column {error.colno})") from error
  except RecursionError as error:
    raise InputError(f"{source}: nested too deeply") from error
  except InputError:
    raise
  except ValueError as error:  # a whole number of more digits than Python reads
    raise InputError(f"{source}: invalid JSON ({one_line(error)})") from error
  if not isinstance(fields, dict):
    raise InputError(f"{source}: a row must be a JSON object, not {type(fields).__name__}")
  _check_usable(source, text, fields)
  return fields


def _check_usable(source: str, text: bytes, fields: dict[str, Any]) -> None:
  """What JSON can say and nothing after it can hold: half characters, and objects without a bottom."""
  if text.count(b"[") + text.count(b"{") > _DEEPEST and _depth(fields) > _DEEPEST:
    raise InputError(f"{source}: nested too deeply")
  if b"\\ud" in text.lower():
    try:
      json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      raise InputError(f"{source}: half of a character (\\ud800 to \\udfff, alone)") from error


def _depth(value: Any) -> int:
  level, depth = [value], 0
  while level and depth <= _DEEPEST:
    inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
    level, depth = [x for values in inner for x in values], depth + 1
  return depth


def _parquet(name: str, file: pathlib.Path) -> Iterator[tuple[int, Fields]]:
  import pyarrow
  import pyarrow.parquet

  row = 0
  try:
    with pyarrow.parquet.ParquetFile(file) as table:
      for batch in table.iter_batches(batch_size=1024):
        for fields in batch.to_pylist():
          row += 1
          yield row, fields
  except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
    raise _unreadable(f"{name}:{row + 1}", error) from error


def _reader_of(columns: Columns, carries: bool) -> Callable[[Row], Row]:
  """Foreign row -> row under our names: by a named format, or by renaming columns."""
  if isinstance(columns, str) and columns in formats.FORMATS:
    return formats.FORMATS[columns]
  names = _column_map(columns, carries)
  return lambda row: _renamed(row, names)


def _column_map(columns: Columns, carries: bool) -> dict[str, tuple[str, ...]]:
  if columns is None:
    return {}
  if isinstance(columns, str):
    if columns not in COLUMN_MAPS:
      known = ", ".join((*COLUMN_MAPS, *formats.FORMATS))
      raise InputError(f"no column map '{columns}' (known: {known})")
    columns = COLUMN_MAPS[columns]
  for field in columns:
    near = difflib.get_close_matches(field.lower(), FIELDS, n=1, cutoff=0.8)
    if field not in FIELDS and not (carries and field.isidentifier() and not near):
      hint = f"; did you mean '{near[0]}'?" if near else ""
      raise InputError(f"columns: '{field}' is not one of our fields ({', '.join(FIELDS)}){hint}")
  return {ours: (theirs,) if isinstance(theirs, str) else tuple(theirs)
          for ours, theirs in columns.items()}  # fmt: skip


def _renamed(row: Row, names: dict[str, tuple[str, ...]]) -> Row:
  """The row under our field names; a mapped column that is absent leaves its field out.

  A column under a name of the user's own must be there: nothing else would miss it.
  """
  if not names:
    return row
  used = {*names, *(column for columns in names.values() for column in columns)}
  fields = {k: v for k, v in row.fields.items() if k not in used}
  for field, columns in names.items():
    if field not in FIELDS:
      for column in columns:
        row.required(column)
    values = [row.fields[c] for c in columns if row.fields.get(c) is not None]
    if len(columns) > 1:
      for column in columns:
        if row.has(column):
          row.text(column)
      values = ["\n".join(v for v in values if v)] if values else []
    if values:
      fields[field] = values[0]
  return Row(row.source, fields)
