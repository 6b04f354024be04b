"""What `experiments.export` can write, a file each."""
