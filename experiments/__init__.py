"""Commands: `python -m experiments.…`."""

import os

# For each program from the compilation cache, XLA logs an error that it was tuned for "prefer-no-gather", which Intel
# CPUs do not list: dozens of harmless lines at each start. Real failures still raise. "1" is jax's own default, which
# it also sets for child processes.
if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
