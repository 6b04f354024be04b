"""The evaluations of `experiments.evaluate`, one file each."""
