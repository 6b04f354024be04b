"""Captioned images: builders, readers and Grain pipelines."""
