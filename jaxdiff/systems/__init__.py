"""Complete systems, one paper per file."""
