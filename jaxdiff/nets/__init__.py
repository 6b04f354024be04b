"""Every network, as Flax Linen modules: arrays in, arrays out."""
