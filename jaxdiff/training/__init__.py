"""Train state, sharded step, loop, checkpoints and mesh."""
