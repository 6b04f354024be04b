"""Checkpoints in public layouts, to and from parameter trees."""
