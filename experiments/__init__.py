"""What can be run: `python -m experiments.…`."""

import os

# XLA reports as errors that a program from the compilation cache was tuned for "prefer-no-gather", which Intel CPUs do
# not list among their features: dozens of lines at each start, without consequence. What fails is raised all the same.
# "1" is what jax itself sets, for the processes that it starts too.
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
