"""Shows records as training sees them: template applied, special tokens and response mask visible.

python -m experiments.inspect_data --path=pairs.jsonl --format=preference --tokenizer=smollm2
python -m experiments.inspect_data --path=microworld:n=5 --tokenizer=microworld
python -m experiments.inspect_data --path=arithmetic:n=5 --format=prompt
"""

import sys

from absl import flags

from align_jax import app

_PATH = flags.DEFINE_string(
  "path",
  None,
  "A file, a folder, hf:org/name:split, microworld:n=5 or arithmetic:n=5.",
  required=True,
)
_FORMAT = flags.DEFINE_enum(
  "format", "sft", ["sft", "preference", "feedback", "prompt"], "What the rows are."
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "smollm2", "A model folder or name, or microworld.")
_COLUMNS = flags.DEFINE_string("columns", None, "Foreign columns: prompt=question,chosen=good.")
_CHAT = flags.DEFINE_bool("chat", True, "False: prompts are literal text.")
_LENGTH = flags.DEFINE_integer("length", 1024, "Longer sequences are cut.", lower_bound=8)
_N = flags.DEFINE_integer("n", 3, "Records to show.", lower_bound=0)
_SUMMARY = flags.DEFINE_integer("summary", 500, "Records whose lengths are counted.", lower_bound=1)


def main():
  from align_jax import data
  from align_jax.data import display

  records, tokenizer = _records(), _tokenizer()
  for record in records[: _N.value]:
    print(display.show(record, tokenizer, _LENGTH.value, colour=sys.stdout.isatty()))
  print(display.summary(records[: _SUMMARY.value], tokenizer, _LENGTH.value))
  if len(records) > _SUMMARY.value:
    print(f"  (the first {_SUMMARY.value} of {len(records)} records)")
  print(f"  fingerprint {data.fingerprint(records)}")


def _records():
  from align_jax import data
  from align_jax.phases import records

  kinds = {"sft": "demonstrations", "preference": "preferences", "prompt": "prompts"}
  if records.is_generated(_PATH.value) and _FORMAT.value in kinds:
    return records.read(_PATH.value, kinds[_FORMAT.value])
  readers = {
    "sft": data.read_demonstrations,
    "preference": data.read_preferences,
    "feedback": data.read_feedback,
    "prompt": data.read_prompts,
  }
  columns = records.parse_columns(_COLUMNS.value)
  return readers[_FORMAT.value](_PATH.value, columns=columns, chat=_CHAT.value)


def _tokenizer():
  if _TOKENIZER.value == "microworld":
    from align_jax import worlds

    return worlds.Microworld().tokenizer()
  from align_jax import models

  return models.load_tokenizer(_TOKENIZER.value)


if __name__ == "__main__":
  app.run(main)
