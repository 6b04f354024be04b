"""Pre-train text encoders."""
