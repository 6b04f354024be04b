"""Runnable scripts, one a task."""
