"""The public files, where ALIGN_JAX_DATA names their folder."""

import os
import pathlib

import numpy as np
import pytest

from align_jax import data

FOLDER = os.environ.get("ALIGN_JAX_DATA")
pytestmark = pytest.mark.skipif(not FOLDER, reason="ALIGN_JAX_DATA names no folder of data")

PREFERENCES = {
  "hh_rlhf_harmless/dev.jsonl": None,
  "hhh_and_cai_evals/hhh_pairs_dev.jsonl": None,
  "alpaca_eval_prefs/dev.jsonl": "alpaca",
  "polite_prefs_tiny/dev.jsonl": "alpaca",
  "rmb/dev.jsonl": "conversation",
  "prefs_demo/dpo_en_dev.jsonl": "messages_as_prompt",
  "prefs_demo/oasst_zh_rm_dev.jsonl": None,
}
DEMONSTRATIONS = {
  "instructions/dev.jsonl": "response",
  "gsm8k/dev.jsonl": "question_answer",
  "polite_prefs_tiny/dev.jsonl": "alpaca",
}


def rows(name):
  return sum(bool(line.strip()) for line in open(pathlib.Path(FOLDER) / name, encoding="utf-8"))


@pytest.mark.parametrize("name", PREFERENCES)
def test_pairs_are_read_whole_and_their_masks_say_the_answers(name, bpe):
  tokenizer = bpe()
  records = data.read_preferences(f"{FOLDER}/{name}", columns=PREFERENCES[name])
  assert len(records) == rows(name)
  for record in records[:40]:
    pair = data.encode_preference(record, tokenizer, 2**20)
    for encoded, answer in zip(pair, (record.chosen, record.rejected)):
      said = tokenizer.decode(encoded.tokens[encoded.response_mask])
      assert said == answer + "<|im_end|>"
      assert np.diff(encoded.response_mask.astype(int)).sum() == 1


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_are_read_whole_and_packed(name, bpe):
  records = data.read_demonstrations(f"{FOLDER}/{name}", columns=DEMONSTRATIONS[name])
  assert len(records) == rows(name)
  batch = next(data.sft_batches(records[:60], bpe(), length=1024, batch_size=4))
  assert (batch["segment_ids"] > 0).mean() > 0.8 and batch["loss_mask"].sum() > 0


def test_hh_prompts_are_dialogues_that_end_with_the_human():
  """[9] No turn of the transcript is left inside another."""
  for record in data.read_preferences(f"{FOLDER}/hh_rlhf_harmless/train.jsonl"):
    roles = [message["role"] for message in record.prompt]
    assert roles == (["user", "assistant"] * len(roles))[: len(roles)] and roles[-1] == "user"
    assert not any("\n\nHuman:" in m["content"] for m in record.prompt)
    assert not any("\n\nAssistant:" in m["content"] for m in record.prompt)
