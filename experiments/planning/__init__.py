"""The modules of `experiments.plan`."""
