"""The instruments of an online run in one page, at any time; or of several runs over each other.

python -m experiments.dashboard --workdirs=runs/grpo
python -m experiments.dashboard --workdirs=runs/ppo,runs/grpo,runs/rloo --output=runs/comparison
"""

from absl import flags

from align_jax import app

_WORKDIRS = flags.DEFINE_list("workdirs", None, "Folders of runs, by commas.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Where to write; needed for several runs.")


def main():
  from align_jax.evals import dashboard

  print(dashboard.write(_WORKDIRS.value, _OUTPUT.value))


if __name__ == "__main__":
  app.run(main)
