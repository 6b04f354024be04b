"""What is trained on its own: settings with `init`, `loss` and `batch_spec`, and how it samples, encodes or decodes."""
