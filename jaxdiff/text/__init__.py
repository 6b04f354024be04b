"""Captions to frozen embeddings: tokenizers and encode functions."""
