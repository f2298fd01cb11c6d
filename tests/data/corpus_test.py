"""The flat store of tokens."""

import numpy as np

from align_jax.data import corpus


class Padding:
  pad_token_id = 9
  eos_token_id = 8


def build(pairs, tokenizer=Padding):
  encoded = [(np.array(t, np.int32), np.array(m, bool)) for t, m in pairs]
  return corpus.build(range(len(pairs)), lambda i: (encoded[i],), tokenizer)


PAIRS = (([1, 2, 3], [0, 1, 1]), ([4], [1]), ([5, 6, 7, 8], [0, 0, 0, 1]))


def test_rows_are_gathered_padded_and_empty_where_asked():
  store, kept = build(PAIRS)
  assert kept.tolist() == [0, 1, 2] and store.prompt_lengths.tolist() == [1, 0, 3]
  rows = store.rows(np.array([[2, 0], [-1, 1]]), 5)
  assert rows["tokens"].tolist() == [[[5, 6, 7, 8, 9], [1, 2, 3, 9, 9]], [[9] * 5, [4, 9, 9, 9, 9]]]
  assert rows["segment_ids"].sum(-1).tolist() == [[4, 3], [0, 1]]
  assert rows["mask"].astype(int).tolist() == [
    [[0, 0, 0, 1, 0], [0, 1, 1, 0, 0]], [[0] * 5, [1, 0, 0, 0, 0]]
  ]  # fmt: skip


def test_crossed_rows_join_one_prompt_and_another_answer():
  store, _ = build(PAIRS)
  rows = store.crossed_rows(np.array([2, 0, -1]), np.array([0, 2, 1]), 5)
  assert rows["tokens"].tolist() == [[5, 6, 7, 2, 3], [1, 8, 9, 9, 9], [9] * 5]
  assert rows["mask"].astype(int).tolist() == [[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0] * 5]
  assert rows["segment_ids"].sum(-1).tolist() == [5, 2, 0]


def test_padding_falls_back_where_a_tokenizer_has_none():
  """[29] Without a pad id nothing moves: masks go by position."""

  class Nothing:
    pad_token_id = None
    eos_token_id = None

  with_pad, without = build(PAIRS)[0], build(PAIRS, Nothing())[0]
  assert (with_pad.pad_id, without.pad_id) == (9, 0)
  rows = [store.rows(np.arange(3), 6) for store in (with_pad, without)]
  np.testing.assert_array_equal(rows[0]["mask"], rows[1]["mask"])
  np.testing.assert_array_equal(rows[0]["segment_ids"], rows[1]["segment_ids"])
