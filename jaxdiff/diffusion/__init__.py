"""The diffusion process: pure functions of arrays."""
