"""The comparisons of `experiments.verify` with independent implementations, one file per family."""
