"""A paper a file: how the boxes form a system."""
