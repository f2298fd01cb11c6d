"""Rows that hold every prompt once: read back token by token, level, few of shape, resumable."""

import json

import grain
import numpy as np
import pytest

from align_jax import data
from align_jax.data import encoding, shared_rows, streams
from align_jax.errors import InputError
from align_jax.models import blockwise

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LENGTH = 64


def words(rng, most):
  return " ".join(rng.choice(list(LETTERS), rng.integers(1, most + 1)))


def records(n, prompt=9, most=12):
  """Pairs of many lengths, every number different."""
  rng = np.random.default_rng(n)
  return [
    data.Preference(
      ({"role": "user", "content": words(rng, prompt)},), words(rng, most), words(rng, most),
      margin=i / 8, weight=1.0 + i, label_prob=1 - i / (2 * n),
    )
    for i in range(n)
  ]  # fmt: skip


def tokenised(tokenizer, n, batch_size=4, **plan):
  plan = {"epochs": 1, "pad_last": True} | plan
  batching = data.Batching(batch_size, **plan)
  return data.tokenise_pairs(records(n), tokenizer, batching, length=LENGTH)


def sequence(corpus, s):
  return corpus.tokens[corpus.starts[s] : corpus.starts[s] + corpus.lengths[s]].tolist()


def read_back(batch):
  """Every pair of a batch as {chosen, rejected, and its numbers}, with all that must hold checked."""
  for row in range(len(batch["tokens"])):
    one = {name: values[row] for name, values in batch.items()}
    count = int(one["segment_ids"].max())
    assert (one["weight"][count:] == 0).all() and (one["weight"][:count] > 0).all()
    used = int((one["segment_ids"] > 0).sum())
    assert (np.diff(one["segment_ids"][:used]) >= 0).all()  # and so in one piece each
    assert (one["segment_ids"][used:] == 0).all() and (one["branch_ids"][used:] == 0).all()
    scored = int((one["slots"] >= 0).sum())
    assert (one["slots"][scored:] == -1).all()  # the real ones come first: chunks may be skipped
    assert set(one["slots"][:scored] // 2) <= set(range(count))
    for segment in range(1, count + 1):
      yield read_pair(one, segment)


def read_pair(one, segment):
  inside = one["segment_ids"] == segment
  at = {b: np.flatnonzero(inside & (one["branch_ids"] == b)) for b in (0, 1, 2)}
  trunk = len(at[0])
  np.testing.assert_array_equal(one["positions"][at[0]], np.arange(trunk))
  slot = segment - 1
  pair = {name: one[name][slot] for name in ("weight", "margin", "label_prob")}
  for side, name in ((0, "chosen"), (1, "rejected")):
    branch = at[side + 1]
    whole = np.concatenate([at[0], branch])
    np.testing.assert_array_equal(one["positions"][whole], np.arange(len(whole)))
    hits = np.flatnonzero(one["slots"] == 2 * slot + side)
    np.testing.assert_array_equal(one["places"][hits], np.arange(len(hits)))
    # The predictor of a token is the one before it in its own sequence: behind the fork too.
    position = one["positions"][one["sources"][hits]] + 1
    np.testing.assert_array_equal(one["sources"][hits], whole[position - 1])
    np.testing.assert_array_equal(one["targets"][hits], one["tokens"][whole[position]])
    assert one["last"][2 * slot + side] == whole[-1]
    pair[name] = one["tokens"][whole].tolist()
    pair[f"{name}_scored"] = position.tolist()
    pair[f"{name}_reference"] = one["ref_logprobs"][hits].tolist() if "ref_logprobs" in one else []
  return pair


def expected_of(pairs):
  """What reading back must give, of every pair, from the corpus."""
  source, corpus = pairs.source, pairs.corpus
  found = []
  for i in range(len(source.kept)):
    pair = {name: source.column(name)[i] for name in ("weight", "margin", "label_prob")}
    for side, name in enumerate(("chosen", "rejected")):
      s = 2 * i + side
      pair[name] = sequence(corpus, s)
      mask = corpus.mask[corpus.starts[s] : corpus.starts[s] + corpus.lengths[s]]
      pair[f"{name}_scored"] = [t for t in np.flatnonzero(mask).tolist() if t > 0]
      pair[f"{name}_reference"] = []
    found.append(pair)
  return found


def in_order(pairs):
  return sorted(pairs, key=lambda pair: pair["weight"])


def test_every_token_of_every_pair_is_there_once(tokenizer):
  pairs = tokenised(tokenizer, 41, batch_size=8)
  found = [p for batch in data.shared_batches(pairs) for p in read_back(batch)]
  assert in_order(found) == expected_of(pairs)


def test_reading_back_sees_a_wrong_predecessor_and_a_wrong_number(tokenizer):
  """The control of the test above."""
  batch = next(data.shared_batches(tokenised(tokenizer, 8, batch_size=8)))
  list(read_back(batch))
  for name in ("sources", "targets", "places", "last", "positions", "branch_ids"):
    broken = dict(batch, **{name: batch[name].copy()})
    broken[name][0, 0] += 1
    with pytest.raises(AssertionError):
      list(read_back(broken))


def test_both_first_tokens_are_predicted_from_the_last_of_the_prompt(tokenizer):
  for batch in data.shared_batches(tokenised(tokenizer, 12)):
    for row, m in np.argwhere((batch["slots"] >= 0) & (batch["places"] == 0)):
      source = batch["sources"][row, m]
      assert batch["branch_ids"][row, source] == 0
      assert batch["branch_ids"][row, source + 1] == 1
    first = (batch["places"] == 0) & (batch["slots"] >= 0)
    assert first.sum() == 2 * (batch["weight"] > 0).sum()


@pytest.fixture
def odd_pairs(tokenizer, monkeypatch):
  """Prompts that tokenise differently, no prompt at all, nothing in common, responses of one token."""

  def encoded(prompt, answer):
    mask = [False] * len(prompt) + [True] * len(answer)
    return np.array([*prompt, *answer], np.int32), np.array(mask)

  table = [
    (encoded([5, 6, 7], [8, 9]), encoded([5, 6, 4, 4], [9, 3])),
    (encoded([3], [9, 9]), encoded([4], [9])),
    (encoded([], [5, 6, 7]), encoded([], [5, 9])),
    (encoded([], [5]), encoded([], [6, 6])),  # one token and no context: nothing to score
    (encoded([7], [7]), encoded([7], [7])),
  ]
  monkeypatch.setattr(encoding, "encode_preference", lambda record, *_: table[record.weight - 1])
  made = [
    data.Preference(({"role": "user", "content": "a"},), "a", "b", weight=i + 1)
    for i in range(len(table))
  ]
  plan = data.Batching(5, epochs=1, pad_last=True)
  return data.tokenise_pairs(made, tokenizer, plan, length=LENGTH)


def test_odd_pairs_are_read_back_too(odd_pairs):
  batch = next(data.shared_batches(odd_pairs))
  assert in_order(read_back(batch)) == expected_of(odd_pairs)
  assert odd_pairs.shared.tolist() == [2, 0, 0, 0, 1]
  # What is left of a prompt behind the fork is context of its own answer, and no target.
  different = in_order(read_back(batch))[0]
  assert different["chosen_scored"] == [3, 4] and different["rejected_scored"] == [4, 5]


def test_an_empty_slot_has_no_number_and_no_token(tokenizer):
  batch = next(data.shared_batches(tokenised(tokenizer, 3, batch_size=8), row_multiple=5))
  assert len(batch["tokens"]) % 5 == 0
  empty = batch["weight"] == 0
  assert empty.sum() == empty.size - 3
  assert (batch["margin"][empty] == 0).all() and (batch["label_prob"][empty] == 1).all()
  rows = (batch["weight"] == 0).all(axis=1)
  assert rows.any() and (batch["tokens"][rows] == tokenizer.pad_token_id).all()
  assert (batch["slots"][rows] == -1).all() and (batch["segment_ids"][rows] == 0).all()


def test_rows_are_as_many_as_asked_for_and_no_pair_changes(tokenizer):
  pairs = tokenised(tokenizer, 40, batch_size=8)
  for multiple in (1, 3, 8):
    batches = list(data.shared_batches(pairs, row_multiple=multiple))
    assert all(len(batch["tokens"]) % multiple == 0 for batch in batches)
    found = [pair for batch in batches for pair in read_back(batch)]
    assert in_order(found) == expected_of(pairs)


def test_long_rows_waste_least_and_no_pair_changes(tokenizer):
  pairs = tokenised(tokenizer, 40, batch_size=8)
  batches = list(data.shared_batches(pairs, long_from=1, row_multiple=2))
  plain = list(data.shared_batches(pairs, row_multiple=2))
  assert all(len(batch["tokens"]) == 2 for batch in batches)
  for batch in batches:
    used = (batch["segment_ids"] > 0).sum(axis=1).max()
    assert batch["tokens"].shape[1] - used < used / 4 + 16
  assert sum(b["tokens"].size for b in batches) < sum(b["tokens"].size for b in plain)
  found = [pair for batch in batches for pair in read_back(batch)]
  assert in_order(found) == expected_of(pairs)


def test_short_rows_and_given_buckets_are_left_as_they_are(tokenizer):
  pairs = tokenised(tokenizer, 40, batch_size=8)
  longest = int(pairs.costs.max())
  plain = [b["tokens"].shape for b in data.shared_batches(pairs)]
  buckets = tuple(sorted({shape[1] for shape in plain}))
  assert [b["tokens"].shape for b in data.shared_batches(pairs, long_from=10 * longest)] == plain
  given = data.shared_batches(pairs, buckets=buckets, long_from=1)
  assert {b["tokens"].shape[1] for b in given} <= set(buckets)


def test_reference_values_land_on_their_tokens(tokenizer):
  pairs = tokenised(tokenizer, 30)
  corpus = pairs.corpus

  def reference(sequences):
    """Values that name sequence and position: s + t / 128, exact in float32."""
    spans = [(s, np.arange(corpus.lengths[s])) for s in sequences]
    return [(s + t[pairs.scored[corpus.starts[s] + t]] / 128).astype(np.float32) for s, t in spans]

  found = in_order(
    p for batch in data.shared_batches(pairs, reference=reference) for p in read_back(batch)
  )
  for i, pair in enumerate(found):
    for side, name in enumerate(("chosen", "rejected")):
      expected = [2 * i + side + t / 128 for t in pair[f"{name}_scored"]]
      assert pair[f"{name}_reference"] == expected


def test_step_marks_are_those_of_the_padded_layout(bpe):
  tokenizer = bpe(None)
  literal = [
    data.Preference(({"role": "text", "content": "the"},), chosen, rejected, weight=i + 1.0)
    for i, (chosen, rejected) in enumerate(
      [("yes\nno yes\nthe", "yes\nno no\nthe"), ("the", "the"), ("no\nyes", "yes"), ("yes", "no")]
    )
  ]
  plan = data.Batching(4, epochs=1, shuffle=False)
  pairs = data.tokenise_pairs(literal, tokenizer, plan, length=LENGTH, steps=True)
  padded = next(data.padded_batches(pairs, LENGTH))
  shared = next(data.shared_batches(pairs))
  assert shared["step_mask"].dtype == np.float32
  for row, slot in np.argwhere(shared["weight"] > 0):
    pair = int(shared["weight"][row, slot]) - 1
    for side in (0, 1):
      marks = shared["step_mask"][row][shared["slots"][row] == 2 * slot + side]
      on = padded["response_mask"][pair, side] > 0
      np.testing.assert_array_equal(marks, padded["step_mask"][pair, side][on])
  assert 0 < shared["step_mask"].sum() < (shared["slots"] >= 0).sum()


def test_a_batch_holds_exactly_its_pairs_and_an_epoch_every_pair_once(tokenizer):
  pairs = tokenised(tokenizer, 150, epochs=2)
  weights = [b["weight"][b["weight"] > 0] for b in data.shared_batches(pairs)]
  assert {len(w) for w in weights[:-1]} == {4} and len(weights) == 75
  seen = np.concatenate(weights)
  assert sorted(seen) == sorted(2 * [1.0 + i for i in range(150)])


def test_without_pad_last_only_whole_batches_come(tokenizer):
  for shuffle in (True, False):
    pairs = tokenised(tokenizer, 14, pad_last=False, shuffle=shuffle)
    assert [(b["weight"] > 0).sum() for b in data.shared_batches(pairs)] == [4, 4, 4]


def test_an_unshuffled_stream_keeps_its_order(tokenizer):
  pairs = tokenised(tokenizer, 14, shuffle=False)
  weights = [sorted(b["weight"][b["weight"] > 0]) for b in data.shared_batches(pairs)]
  assert weights == [[1.0 + i for i in range(a, min(a + 4, 14))] for a in (0, 4, 8, 12)]


def skewed(rng, n):
  """Lengths as of real chats: most short, few long."""
  return np.clip(rng.lognormal(4.0, 0.7, n), 8, 500).astype(np.int64)


def even(rng, n):
  return rng.integers(100, 500, n)


@pytest.mark.parametrize("lengths, share", [(even, 0.1), (skewed, 0.5)])
def test_batches_of_one_row_length_have_like_totals(lengths, share):
  """Against batches as they come: their totals spread many times as far, in a long tail twice."""
  costs = lengths(np.random.default_rng(0), 512)
  order = np.random.default_rng(1).permutation(512)
  batches = shared_rows._balanced(order, costs, (512,), 16, np.random.default_rng(2))
  assert sorted(np.concatenate(batches)) == list(range(512)) and {len(b) for b in batches} == {16}
  spread, as_they_come = (
    np.std([costs[batch].sum() for batch in made]) for made in (batches, order.reshape(-1, 16))
  )
  assert spread < share * as_they_come


def test_batches_go_to_the_shortest_row_that_holds_all_their_pairs_but_for_what_is_left_over():
  costs = skewed(np.random.default_rng(0), 512 + 7)
  sizes = (64, 128, 256, 512)
  batches = shared_rows._balanced(np.arange(519), costs, sizes, 16, np.random.default_rng(1))
  assert sorted(np.concatenate(batches)) == list(range(519))
  assert [len(b) for b in batches] == 32 * [16] + [7]
  needed = np.searchsorted(sizes, [costs[b].max() for b in batches])
  assert (np.diff(needed) >= 0).all() and len(set(needed)) == 4
  below = sum((costs[b] <= sizes[k - 1]).sum() for b, k in zip(batches, needed) if k)
  assert below < 16 * len(sizes)  # at most what does not fill a batch moves up


def test_a_file_of_one_window_is_dealt_anew_in_every_epoch():
  """Pairs that always met would be a batch of their own kind; their lengths are near, not fixed."""
  costs = skewed(np.random.default_rng(0), 128)
  epochs = [
    {frozenset(b) for b in shared_rows._balanced(np.arange(128), costs, (512,), 8, rng)}
    for rng in map(np.random.default_rng, range(4))
  ]
  assert len(set.union(*epochs)) >= 60  # of 64 batches


def test_an_epoch_has_few_shapes(tokenizer):
  """Every shape is a compilation; the batches themselves differ all the time."""
  pairs = tokenised(tokenizer, 600, batch_size=16)
  batches = list(data.shared_batches(pairs))
  shapes = {tuple(sorted((k, v.shape) for k, v in b.items())) for b in batches}
  totals = {int((b["segment_ids"] > 0).sum()) for b in batches}
  assert len(batches) == 38 and len(shapes) <= 6 < 2 * 6 < len(totals)
  lengths = {b["tokens"].shape[1] for b in batches}
  assert lengths <= set(shared_rows.row_lengths(pairs.costs))


def test_rows_are_rounded_up_to_three_significant_bits():
  counts = [shared_rows.rounded(n) for n in range(1, 65)]
  assert all(n <= c <= 1.25 * n for n, c in enumerate(counts, start=1))
  assert sorted(set(counts)) == [
    *range(1, 8), 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64
  ]  # fmt: skip


def test_long_rows_are_whole_tiles_of_attention():
  """Of a CPU, where there are long rows: what is no whole tile would be padded in every layer."""
  assert shared_rows._TILE % blockwise.SERIAL_BLOCK == 0


def test_row_lengths_hold_the_longest_pair_and_1_5_times_the_mean():
  costs = np.array([20, 30, 40, 500])
  sizes = shared_rows.row_lengths(costs)
  assert sizes == (256, 512) and 128 < 1.5 * costs.mean() <= 256
  assert shared_rows.row_lengths(np.array([7])) == (16,)
  assert shared_rows.row_lengths(costs, (600, 100)) == (100, 600)


@pytest.mark.parametrize("buckets", [(16, 38), (0, 64)])
def test_buckets_that_hold_no_pair_are_refused(tokenizer, buckets):
  pairs = tokenised(tokenizer, 40)
  longest = pairs.costs.max()
  assert longest > 38
  with pytest.raises(InputError, match=f"longest pair needs a row of {longest} tokens"):
    data.shared_batches(pairs, buckets=buckets)
  data.shared_batches(pairs, buckets=(16, longest))


def test_given_buckets_are_the_only_lengths(tokenizer):
  pairs = tokenised(tokenizer, 40)
  batches = list(data.shared_batches(pairs, buckets=(24, 90)))
  assert {b["tokens"].shape[1] for b in batches} == {24, 90}
  assert in_order(p for b in batches for p in read_back(b)) == expected_of(pairs)


def test_no_row_holds_more_pairs_than_it_has_slots():
  costs = np.array([1] * 30 + [90, 60, 40])
  rows = streams.best_fit(costs, 100, most=8)
  assert sorted(sum(rows, [])) == list(range(33))
  assert max(map(len, rows)) <= 8 and max(costs[row].sum() for row in rows) <= 100
  assert rows[0][0] == 30 and rows[1][:2] == [31, 32]  # the fullest row that has the room


@pytest.mark.parametrize("count", [2, 3])
def test_hosts_share_the_rows_of_one_host(tokenizer, count):
  """Made with the row multiple that keeps the global batch the same."""
  whole = list(data.shared_batches(tokenised(tokenizer, 40, batch_size=12), row_multiple=count))
  parts = [
    list(
      data.shared_batches(tokenised(tokenizer, 40, batch_size=12, shard_index=i, shard_count=count))
    )
    for i in range(count)
  ]
  assert {len(part) for part in parts} == {len(whole)}
  for step, batch in enumerate(whole):
    for name, values in batch.items():
      for host in range(count):
        np.testing.assert_array_equal(parts[host][step][name], np.split(values, count)[host])


def endless(tokenizer):
  return data.shared_batches(tokenised(tokenizer, 30, epochs=None, pad_last=False, seed=1))


def test_an_iterator_resumes_exactly_in_and_between_windows(tokenizer):
  """30 pairs by 4 in windows of 16 batches: epochs end within batches and windows."""
  iterator, states, batches = endless(tokenizer), [], []
  for _ in range(20):
    states.append(json.dumps(iterator.get_state()))
    batches.append(next(iterator))
  for step in (0, 7, 15, 16, 17):
    again = endless(tokenizer)
    again.set_state(json.loads(states[step]))
    for batch in batches[step : step + 3]:
      found = next(again)
      for name in batch:
        np.testing.assert_array_equal(found[name], batch[name])
  assert not np.array_equal(batches[0]["weight"], batches[1]["weight"])  # the control


def test_grain_agrees_that_it_resumes(tokenizer):
  class Again:
    def __iter__(self):
      return data.shared_batches(tokenised(tokenizer, 10, epochs=3, seed=5))

  grain.experimental.assert_equal_output_after_checkpoint(Again())


def test_a_state_of_other_records_is_refused(tokenizer):
  state = data.shared_batches(tokenised(tokenizer, 10)).get_state()
  with pytest.raises(InputError, match="had records 10, this has 11"):
    data.shared_batches(tokenised(tokenizer, 11)).set_state(state)
