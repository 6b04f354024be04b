"""Trainable models: settings with `init`, `loss` and `batch_spec`, and functions to sample, encode or decode."""
