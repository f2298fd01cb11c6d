"""TRL's GRPO trainer on responses that are there already: its update, without its sampling."""

from typing import Any

from align_jax.phases.peer_config import ADVANTAGES, ANSWERS, CLIP


def arguments(batch_size: int) -> dict[str, Any]:
  """Two responses a prompt, and the clip range of both sides; all else is TRL's default."""
  return {
    "per_device_train_batch_size": 2 * batch_size,
    "num_generations": 2,
    "epsilon": CLIP,
    "shuffle_dataset": False,
  }


def numbered(rows: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
  """The rows with a number, by which their old log-probs are found, and the prompt that TRL asks for.

  A row that comes several times has one number.
  """
  numbers: dict[int, int] = {}
  return [row | {"number": numbers.setdefault(id(row), len(numbers)), "prompt": ""} for row in rows]


def unused(prompts, completions, **kwargs) -> list[float]:
  """A reward: TRL wants one, and the advantages are given."""
  raise AssertionError("nothing is sampled, so nothing is to be scored")


def without_sampling(trainer):
  """`trainer` where a batch's responses are its rows' own.

  Before the first step the start's log-probs of all rows are taken, one row at a time: the policy
  that "sampled". TRL's own short cut, old = new, would make every loss the mean advantage.
  """

  class WithoutSampling(trainer):
    def _generate_and_score_completions(self, rows):
      if not hasattr(self, "old"):
        distinct = {row["number"]: row for row in self.train_dataset}
        self.old = {number: self._start_logps(row) for number, row in distinct.items()}
      rows = rows[::2]  # each comes as often as there are responses
      inputs = self._padded([(r["prompt_ids"], r[name]) for r in rows for name in ANSWERS])
      old = [x for row in rows for x in self.old[row["number"]]]
      mask = inputs["completion_mask"]
      return inputs | {
        "advantages": mask.new_tensor(ADVANTAGES * len(rows), dtype=old[0].dtype),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": _right(old, 0.0).to(mask.device),
      }

    def _start_logps(self, row):
      import torch

      found = []
      for name in ANSWERS:
        i = self._padded([(row["prompt_ids"], row[name])])
        pair = [(i[f"prompt_{x}"], i[f"completion_{x}"]) for x in ("ids", "mask")]
        ids, mask = (torch.cat(both, dim=1) for both in pair)
        with torch.no_grad():
          logps = self._get_per_token_logps_and_entropies(self.model, ids, mask, len(row[name]))[0]
        found.append(logps[0].float().cpu())
      return found

    def _padded(self, answers):
      """Prompts padded on the left and responses on the right, as TRL has them."""
      import torch

      prompts, responses = ([torch.tensor(ids) for ids in part] for part in zip(*answers))
      parts = {"prompt": (prompts, _left), "completion": (responses, _right)}
      found = {}
      for name, (ids, pad) in parts.items():
        found[f"{name}_ids"] = pad(ids, 0).to(self.accelerator.device)
        found[f"{name}_mask"] = pad([torch.ones_like(x) for x in ids], 0).to(
          self.accelerator.device
        )
      return found

  return WithoutSampling


def _right(rows, value):
  import torch

  return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _left(rows, value):
  return _right([row.flip(0) for row in rows], value).flip(1)
