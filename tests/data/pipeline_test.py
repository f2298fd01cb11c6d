"""Batches: what they hold, that nothing is lost or leaks, and that they resume exactly.

Numbers in brackets are those of the bug list in section 3 of the peer survey. [44]: what a model
does with segment ids and positions is the models' to test; here they are checked token by token.
"""

import collections
import json
import logging

import grain
import jax
import numpy as np
import pytest

from align_jax import data
from align_jax.data import corpus
from align_jax.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def user(text):
  return ({"role": "user", "content": text},)


def text(i, most=6):
  """Some letters, different for different i."""
  return " ".join(LETTERS[(i * 7 + j * 3) % 26] for j in range(i % most + 1))


def demonstrations(n):
  return [
    data.Demonstration(
      (*user(text(i)), {"role": "assistant", "content": text(i + 1)}, *user("z"),
       {"role": "assistant", "content": text(i + 2)}), weight=1.0 + i % 3,
    )
    for i in range(n)
  ]  # fmt: skip


def preferences(n):
  return [
    data.Preference(
      user(text(i)), text(i + 1), text(2 * i), margin=i / 4, weight=1 + i, label_prob=0.9
    )
    for i in range(n)
  ]


def feedback(n):
  return [data.Feedback(user(text(i)), text(i + 1), i % 3 == 0, 1.0 + i) for i in range(n)]


def prompts(n):
  return [data.Prompt(user(text(i)), {"i": i}) for i in range(n)]


KINDS = {
  "packed": (data.sft_batches, demonstrations, {"length": 64}),
  "padded": (data.sft_batches, demonstrations, {"length": 64, "pack": False}),
  "bucketed": (
    data.sft_batches, demonstrations, {"length": 64, "pack": False, "buckets": (16, 24)}
  ),
  "preference": (data.preference_batches, preferences, {"length": 32}),
  "pair buckets": (data.preference_batches, preferences, {"length": 32, "buckets": (12, 16)}),
  "feedback": (data.feedback_batches, feedback, {"length": 32}),
  "prompt": (data.prompt_batches, prompts, {"length": 16}),
}  # fmt: skip


def make(kind, tokenizer, n, **options):
  batches, records, fixed = KINDS[kind]
  return batches(records(n), tokenizer, **fixed, **options)


class Again:
  """A data set whose iterator is made anew, for grain's test."""

  def __init__(self, make_iterator):
    self.make_iterator = make_iterator

  def __iter__(self):
    return self.make_iterator()


def segments(batch):
  """(tokens, positions, loss) of every segment of every row."""
  for row in range(len(batch["tokens"])):
    for segment in range(1, batch["segment_ids"][row].max() + 1):
      at = np.flatnonzero(batch["segment_ids"][row] == segment)
      assert (np.diff(at) == 1).all()
      yield tuple(batch[name][row, at] for name in ("tokens", "positions", "loss_mask"))


def test_packed_tokens_are_the_unpacked_ones(tokenizer):
  """[6] Every (record, token, weight) under the loss is there as often packed as not."""
  counts = []
  for pack in (True, False):
    count = collections.Counter()
    for batch in data.sft_batches(
      demonstrations(40), tokenizer, length=64, batch_size=4, epochs=1, pack=pack, pad_last=True
    ):
      for tokens, _, loss in segments(batch):
        count.update(zip([tuple(tokens)] * len(tokens), range(len(tokens)), tokens, loss))
    counts.append(count)
  assert counts[0] == counts[1]
  assert sum(n for (_, _, _, loss), n in counts[0].items() if loss) > 40


def test_every_packed_segment_is_one_record_with_its_own_positions(tokenizer):
  """[44] No token of a neighbour, positions from 0, and no loss on a first token."""
  records = demonstrations(40)
  expected = collections.Counter()
  for record in records:
    encoded = data.encode_demonstration(record, tokenizer, 64)
    expected[tuple(encoded.tokens), tuple(encoded.response_mask * record.weight)] += 1
  found = collections.Counter()
  rows = 0
  for batch in data.sft_batches(
    records, tokenizer, length=64, batch_size=4, epochs=1, pad_last=True
  ):
    rows += (batch["segment_ids"].max(axis=1) > 0).sum()
    for tokens, positions, loss in segments(batch):
      assert positions.tolist() == list(range(len(tokens)))
      assert loss[0] == 0
      found[tuple(tokens), tuple(loss)] += 1
    assert (batch["loss_mask"][batch["segment_ids"] == 0] == 0).all()
  assert found == expected
  assert rows < 40 / 2


def test_the_first_token_of_plain_text_is_not_predicted_from_a_neighbour(words):
  """[44] Text without BOS: its first token has no context of its own."""
  empty = {"role": "text", "content": ""}
  records = [
    data.Demonstration((empty, {"role": "assistant", "content": text(i)})) for i in range(9)
  ]
  for pack in (True, False):
    batch = next(data.sft_batches(records, words(None), length=16, batch_size=2, pack=pack))
    assert (batch["loss_mask"][batch["positions"] == 0] == 0).all()
    assert batch["loss_mask"].sum() == (batch["positions"] > 0).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad_last", [False, True])
def test_iterators_resume_exactly_at_every_step(kind, pad_last, tokenizer):
  """[32, 33] 10 records by 4 over 3 epochs: the steps lie before, on and after epoch boundaries."""
  grain.experimental.assert_equal_output_after_checkpoint(
    Again(lambda: make(kind, tokenizer, 10, batch_size=4, epochs=3, seed=5, pad_last=pad_last))
  )


@pytest.mark.parametrize("kind", KINDS)
def test_an_endless_iterator_resumes_at_the_first_and_last_step_of_an_epoch(kind, tokenizer):
  """[32] 12 records by 4: three steps an epoch (where rows are not packed); its state is JSON."""
  iterator = make(kind, tokenizer, 12, batch_size=4, seed=1)
  states, batches = [], []
  for _ in range(10):
    states.append(json.dumps(iterator.get_state()))
    batches.append(next(iterator))
  for step in (0, 2, 3, 5, 6, 9):
    again = make(kind, tokenizer, 12, batch_size=4, seed=1)
    again.set_state(json.loads(states[step]))
    for batch in batches[step:]:
      jax.tree.map(np.testing.assert_array_equal, next(again), batch)


def rows_of(batches):
  """Every row as bytes of all its arrays, and so comparable."""
  return [
    b"".join(np.ascontiguousarray(batch[name][row]).tobytes() for name in sorted(batch))
    for batch in batches
    for row in range(len(batch["tokens"]))
  ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad_last", [False, True])
def test_hosts_share_the_batches_of_one_host(kind, pad_last, tokenizer):
  """[40] Every host makes as many steps, and together they make the batch one host would."""
  options = {"batch_size": 6, "epochs": 2, "seed": 3, "pad_last": pad_last}
  whole = list(make(kind, tokenizer, 16, **options))
  parts = [
    list(make(kind, tokenizer, 16, shard_index=i, shard_count=3, **options)) for i in range(3)
  ]
  assert {len(part) for part in parts} == {len(whole)}
  for step, batch in enumerate(whole):
    together = [row for part in parts for row in rows_of(part[step : step + 1])]
    assert len(together) == 6
    assert sorted(together) == sorted(rows_of([batch]))


@pytest.mark.parametrize("kind", ["padded", "bucketed", "preference", "pair buckets", "feedback"])
def test_every_record_once_an_epoch_and_padding_weighs_nothing(kind, tokenizer):
  weights = []
  for batch in make(kind, tokenizer, 13, batch_size=4, epochs=1, pad_last=True):
    weight = batch["weight"] if "weight" in batch else batch["loss_mask"].max(axis=-1)
    empty = weight == 0
    weights += weight[~empty].tolist()
    assert (batch["segment_ids"][empty] == 0).all()
    for name in ("response_mask", "loss_mask", "mismatched_response_mask"):
      if name in batch:
        assert (batch[name][empty] == 0).all() and (batch[name][~empty].sum(axis=-1) > 0).all()
  assert len(weights) == 13
  if "weight" in batch:
    assert sorted(weights) == [1.0 + i for i in range(13)]


def test_what_is_left_of_an_epoch_is_dropped_only_at_the_very_end(tokenizer):
  batches = list(make("prompt", tokenizer, 10, batch_size=4, epochs=3))
  assert len(batches) == 30 // 4
  index = np.concatenate([batch["index"] for batch in batches])
  assert sorted(index[:10]) == sorted(index[10:20]) == list(range(10))


def test_seeds_and_epochs_change_the_order_and_nothing_else_does(tokenizer):
  first = [
    next(make("prompt", tokenizer, 50, batch_size=50, seed=s))["index"].tolist() for s in (1, 1, 2)
  ]
  assert first[0] == first[1] != first[2]
  unshuffled = make("prompt", tokenizer, 50, batch_size=50, shuffle=False)
  assert next(unshuffled)["index"].tolist() == list(range(50))


def test_more_padding_changes_no_token_and_no_mask(tokenizer, words):
  """[17] Length and pad id are nothing to what lies under the segment ids."""
  other = words(pad="<unk>")
  for kind, long in (("padded", 96), ("preference", 80), ("feedback", 80)):
    batches, records, fixed = KINDS[kind]
    short = next(make(kind, tokenizer, 8, batch_size=8))
    longer = next(batches(records(8), other, **{**fixed, "length": long}, batch_size=8))
    for name, value in short.items():
      value = np.where(short["segment_ids"] > 0, value, 0) if name == "tokens" else value
      wide = (
        np.where(longer["segment_ids"] > 0, longer[name], 0) if name == "tokens" else longer[name]
      )
      if not name.startswith("mismatched"):
        cut = wide[..., : value.shape[-1]] if value.ndim > 1 else wide
        np.testing.assert_array_equal(cut, value)
        assert value.ndim == 1 or (wide[..., value.shape[-1] :] == 0).all()


@pytest.mark.parametrize("kind", ["packed", "padded", "preference", "feedback", "prompt"])
def test_padding_with_the_eos_moves_no_mask(kind, words):
  """[1, 2] The turn end stays a target, and every batch what it is with a padding of its own."""
  apart, same = words(pad="<pad>", eos="<|im_end|>"), words(pad="<|im_end|>", eos="<|im_end|>")
  a, b = (next(make(kind, tokenizer, 8, batch_size=4)) for tokenizer in (apart, same))
  for name in a:
    if not name.endswith("tokens"):
      np.testing.assert_array_equal(a[name], b[name])
  if kind == "prompt":
    real = np.arange(16) < a["lengths"][:, None]
  else:
    real = a["segment_ids"] > 0
    ends = a["tokens"] == same.eos_token_id
    masked = a["loss_mask" if "loss_mask" in a else "response_mask"] > 0
    assert (ends & masked).any(axis=-1).sum() == real.any(axis=-1).sum()
  np.testing.assert_array_equal(a["tokens"][real], b["tokens"][real])
  assert (b["tokens"][~real] == same.eos_token_id).all()


def test_the_last_response_token_is_found_by_length(words):
  """[3, 29] Also where pad == EOS: the last real token is the turn end, and it is response."""
  tokenizer = words(pad="<|im_end|>", eos="<|im_end|>")
  batch = next(data.preference_batches(preferences(8), tokenizer, length=32, batch_size=8))
  last = batch["segment_ids"].sum(axis=-1) - 1
  take = np.take_along_axis
  assert (take(batch["tokens"], last[..., None], -1) == tokenizer.eos_token_id).all()
  assert (take(batch["response_mask"], last[..., None], -1) == 1).all()
  assert (batch["response_mask"].cumsum(-1).argmax(-1) == last).all()


def test_pairs_are_chosen_then_rejected_with_their_numbers(tokenizer):
  records = preferences(8)
  batch = next(data.preference_batches(records, tokenizer, length=32, batch_size=8, shuffle=False))
  for i, record in enumerate(records):
    for side, answer in enumerate((record.chosen, record.rejected)):
      said = batch["tokens"][i, side][batch["response_mask"][i, side] > 0]
      assert tokenizer.decode(said) == answer + " <|im_end|>"
    shared = np.flatnonzero(batch["response_mask"][i].max(axis=0))[0]
    np.testing.assert_array_equal(batch["tokens"][i, 0, :shared], batch["tokens"][i, 1, :shared])
  np.testing.assert_array_equal(batch["margin"], np.arange(8) / 4)
  np.testing.assert_array_equal(batch["weight"], 1.0 + np.arange(8))
  np.testing.assert_allclose(batch["label_prob"], 0.9, rtol=1e-6)


def halves(tokens, mask, tokenizer):
  return tuple(tokenizer.decode(tokens[at]) for at in (~mask.astype(bool), mask.astype(bool)))


def test_mismatched_answers_are_anothers_to_the_same_prompt(tokenizer):
  """[31] KTO's baseline pairs each prompt with another record's answer, anew every epoch."""
  records = [data.Feedback(user(c), c.upper().lower() + " q", True) for c in LETTERS[:12]]
  batches = data.feedback_batches(records, tokenizer, length=16, batch_size=12, seed=0)
  partners = []
  for _ in range(40):
    batch = next(batches)
    pairing = {}
    for i in range(12):
      own = batch["segment_ids"][i] > 0, batch["mismatched_segment_ids"][i] > 0
      prompt, answer = halves(
        batch["tokens"][i][own[0]], batch["response_mask"][i][own[0]], tokenizer
      )
      same, other = halves(
        batch["mismatched_tokens"][i][own[1]],
        batch["mismatched_response_mask"][i][own[1]],
        tokenizer,
      )
      assert prompt == same and answer != other and other.endswith("q <|im_end|>")
      pairing[answer[0]] = other[0]
    partners.append(pairing)
  assert partners[0] != partners[1]
  counts = collections.Counter(p["a"] for p in partners)
  assert len(counts) >= 9 and "a" not in counts


def test_a_mismatched_row_that_is_too_long_is_cut(tokenizer):
  records = [data.Feedback(user(text(5)), "a", True), data.Feedback(user("a"), text(11, 12), True)]
  batch = next(data.feedback_batches(records, tokenizer, length=20, batch_size=2, shuffle=False))
  assert batch["mismatched_segment_ids"].sum(axis=1).max() == 20
  assert (batch["mismatched_response_mask"].sum(axis=1) > 0).all()


def test_prompts_end_where_the_assistant_speaks_and_point_to_their_record(tokenizer):
  records = prompts(10)
  for batch in data.prompt_batches(
    records, tokenizer, length=16, batch_size=4, epochs=1, pad_last=True
  ):
    for tokens, length, index in zip(batch["tokens"], batch["lengths"], batch["index"]):
      assert tokenizer.decode(tokens[:length]).endswith("<|im_end|> <|im_start|> assistant")
      if index >= 0:
        assert records[index].prompt[0]["content"] in tokenizer.decode(tokens[:length])
  assert batch["index"].tolist()[-2:] == [-1, -1]


def test_shapes_and_types_are_those_of_the_contract(tokenizer):
  i32, f32 = np.dtype("int32"), np.dtype("float32")
  expected = {
    "packed": {"tokens": i32, "segment_ids": i32, "positions": i32, "loss_mask": f32},
    "preference": {"tokens": i32, "segment_ids": i32, "response_mask": f32, "weight": f32,
                   "margin": f32, "label_prob": f32},
    "feedback": {"tokens": i32, "segment_ids": i32, "response_mask": f32, "is_desirable": f32,
                 "weight": f32, "mismatched_tokens": i32, "mismatched_segment_ids": i32,
                 "mismatched_response_mask": f32},
    "prompt": {"tokens": i32, "lengths": i32, "index": i32},
  }  # fmt: skip
  for kind, names in expected.items():
    for batch in make(kind, tokenizer, 10, batch_size=4, epochs=1, pad_last=True):
      assert {name: array.dtype for name, array in batch.items()} == names
      assert {len(array) for array in batch.values()} == {4}
  assert next(make("preference", tokenizer, 4, batch_size=4))["tokens"].shape == (4, 2, 32)


def test_buckets_fit_what_they_hold_and_hold_everything(tokenizer):
  seen = 0
  for batch in make("bucketed", tokenizer, 50, batch_size=4, epochs=1, pad_last=True):
    longest = batch["segment_ids"].sum(axis=1).max()
    assert batch["tokens"].shape[1] in (16, 24, 64) and longest <= batch["tokens"].shape[1]
    seen += (batch["segment_ids"].max(axis=1) > 0).sum()
  assert seen == 50


@pytest.mark.parametrize(
  "kind, options, complaint",
  [
    ("packed", {"buckets": (8,)}, "packed or bucketed, not both"),
    ("preference", {"buckets": (64,)}, "must lie between 1 and the length 32"),
    ("padded", {"batch_size": 5, "shard_count": 2}, "batch_size 5 does not divide among 2 hosts"),
    ("padded", {"shard_index": 2, "shard_count": 2}, "shard_index 2 is not below 2"),
    ("padded", {"pad_last": True}, "pad_last needs a number of epochs"),
    ("prompt", {"overlong": "skip"}, "overlong must be one of"),
    ("feedback", {"batch_size": 1}, "batch_size must be at least 2"),
  ],
)
def test_options_that_do_not_go_together_are_refused(kind, options, complaint, tokenizer):
  """[31] among them: KTO refuses a batch of one."""
  with pytest.raises(InputError, match=complaint):
    make(kind, tokenizer, 4, **{"batch_size": 4, **options})


def test_no_records_and_one_record(tokenizer):
  with pytest.raises(InputError, match="there are no records"):
    make("padded", tokenizer, 0, batch_size=2)
  with pytest.raises(InputError, match="at least two records"):
    make("feedback", tokenizer, 1, batch_size=2)


def test_a_data_set_smaller_than_a_batch_still_fills_it(tokenizer):
  batch = next(make("prompt", tokenizer, 3, batch_size=8))
  assert sorted(batch["index"][:3]) == sorted(batch["index"][3:6]) == [0, 1, 2]


def test_dropped_records_are_counted(tokenizer, caplog):
  records = [*prompts(3), data.Prompt(user("a " * 40))]
  with caplog.at_level(logging.WARNING):
    batch = next(data.prompt_batches(records, tokenizer, length=16, batch_size=3, epochs=1))
  assert sorted(batch["index"]) == [0, 1, 2]
  assert "dropped 1 of 4 records as too long" in caplog.text
  with pytest.raises(InputError, match="all 1 records were dropped as too long"):
    data.prompt_batches(records[3:], tokenizer, length=16, batch_size=1)


def test_long_tokenising_shows_a_bar(tokenizer, capsys, monkeypatch):
  make("prompt", tokenizer, 5, batch_size=2)
  assert "tokenising" not in capsys.readouterr().err
  monkeypatch.setattr(corpus, "_QUIET", 4)
  make("prompt", tokenizer, 5, batch_size=2)
  assert "tokenising" in capsys.readouterr().err
