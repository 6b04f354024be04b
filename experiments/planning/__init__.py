"""What `experiments.plan` is made of."""
