"""Gold, proxies of it, and what happens to gold when they are optimised: best-of-n, RL, and their laws.

  python -m experiments.overoptimization --config=configs/overoptimization.py --workdir=runs/gao

Steps that are done are skipped: the same command resumes an interrupted run, and sizes, arms, ensembles
and runs may be added later.
"""

from align_jax import app

CONFIG, WORKDIR = app.define("configs/overoptimization.py")


def main():
  from align_jax.phases import overoptimization

  app.coordinate()
  overoptimization.run(app.values(CONFIG), WORKDIR.value, app.worker_devices)


if __name__ == "__main__":
  app.run(main)
