"""Image files written by commands, and their names."""
