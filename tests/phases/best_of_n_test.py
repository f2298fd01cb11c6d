"""Best-of-n as a part of an evaluation: its settings, and one small run from checkpoint to picture."""

import jax
import pytest

from align_jax import config as config_lib
from align_jax.errors import InputError
from align_jax.evals import best_of_n
from align_jax.phases import evaluate
from configs import evaluate as evaluate_config

WORLD = "microworld:n=3,split=heldout"
GOOD = {"best_of": (1, 4), "best_of_samples": 8, "selector": "gold"}


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"best_of": ()}, "config.best_of_samples and config.best_of go together"),
    ({"best_of_samples": None}, "config.best_of_samples and config.best_of go together"),
    ({"selector": None}, "config.selector and config.best_of go together"),
    ({"best_of": (1, 9)}, r"best_of must lie in \[1, best_of_samples\] = \[1, 8\]"),
    ({"batch_size": 4}, "config.batch_size must hold the config.best_of_samples"),
  ],
)
def test_settings_go_together(changes, message):
  evaluate.EvaluateConfig(data=WORLD, **GOOD)
  with pytest.raises(InputError, match=message):
    evaluate.EvaluateConfig(data=WORLD, **GOOD | changes)


def test_the_config_file_has_them_and_asks_for_nothing():
  config = evaluate_config.get_config()
  built = config_lib.build(evaluate.EvaluateConfig, config.to_dict())
  assert built.best_of == ()
  config.update(GOOD)
  assert config_lib.build(evaluate.EvaluateConfig, config.to_dict()).best_of == (1, 4)


def test_a_policy_is_chosen_from_by_the_selector_and_judged_by_the_scorer(monkeypatch, tmp_path):
  """The run's wiring, with the models left out: which score chooses, and what is written where."""
  asked = []

  def scorer(config, loaded, mesh):
    asked.append(config.scorer)
    return config.scorer, None

  def found(of, prompts, tokenizer, selector, scorer, settings, **options):
    asked.append((selector, scorer, len(prompts), options["sizes"], options["samples"]))
    assert (options["selector_name"], options["scorer_name"]) == ("reward:rm", "gold")
    return "found"

  class Loaded:
    head = model = params = tokenizer = None

  monkeypatch.setattr(evaluate, "make_scorer", scorer)
  monkeypatch.setattr(best_of_n, "evaluate_best_of_n", found)
  config = evaluate.EvaluateConfig(data=WORLD, **GOOD | {"selector": "reward:rm"})
  assert evaluate._evaluate_best_of(config, "sft", Loaded, None) == "found"
  assert asked == ["reward:rm", "gold", ("reward:rm", "gold", 3, (1, 4), 8)]


def test_a_reward_model_has_no_best_of_n(monkeypatch, tmp_path):
  class Loaded:
    head = {}

  monkeypatch.setattr(evaluate.workspace, "load", lambda *args, **settings: Loaded)
  with pytest.raises(InputError, match="rm is a reward model; a policy is needed"):
    config = evaluate.EvaluateConfig(data=WORLD, policy="rm", **GOOD)
    evaluate.run(config, str(tmp_path), jax.devices()[:1])
