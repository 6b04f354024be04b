"""What can be run: `python -m experiments.…`."""

import os

# Only its tokenizers are used here, which need no PyTorch: nobody has to be told on every start that it is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# XLA reports as errors that a program from the compilation cache was tuned for "prefer-no-gather", which Intel CPUs do
# not list among their features: dozens of lines at each start, without consequence. What fails is raised all the same.
# "1" is what jax itself sets, for the processes that it starts too.
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
