"""A command on every host of a Cloud TPU slice, through preemptions, with gcloud doing the work.

`commands` says what gcloud is asked, `controller` when, `worker` runs on the slice's machines.
"""
