"""Captions to frozen embeddings: one protocol of text encoders, and tokenizers."""
