"""The formats of `experiments.export`, one file each."""
