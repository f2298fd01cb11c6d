"""Objectives x settings x seeds from one start, evaluated alike: one table and one frontier plot.

  python -m experiments.sweep --config=configs/sweep.py --workdir=runs/sweep

The same command goes on where an interrupted sweep stopped, and repeats nothing. On several hosts that
share the workdir, host i of n adds `--job_index=i --job_count=n`.
"""

from absl import flags

from align_jax import app

CONFIG, WORKDIR = app.define("configs/sweep.py")
JOB_INDEX = flags.DEFINE_integer("job_index", 0, "Which share of the runs this host takes.")
JOB_COUNT = flags.DEFINE_integer("job_count", 1, "Into how many shares the runs are split.")


def main():
  from align_jax.phases import sweep

  app.coordinate()
  table = sweep.run(
    app.values(CONFIG),
    WORKDIR.value,
    app.worker_devices,
    job_index=JOB_INDEX.value,
    job_count=JOB_COUNT.value,
  )
  return 1 if table.failed else 0


if __name__ == "__main__":
  app.run(main)
