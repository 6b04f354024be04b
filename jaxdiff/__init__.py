"""Text-to-image generation in pure-functional JAX."""
