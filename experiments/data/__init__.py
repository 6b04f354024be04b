"""Preparing data: the emoji set, converting large sets, storing text embeddings."""
