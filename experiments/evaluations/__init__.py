"""What `experiments.evaluate` can measure, a file each."""
