"""Frozen text encoders with one protocol, and tokenizers."""
