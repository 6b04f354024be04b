"""Helpers for every package; imports no other package of jaxdiff."""
