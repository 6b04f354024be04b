"""What can be run: `python -m experiments.…`."""

import os

# Only its tokenizers are used here, which need no PyTorch: nobody has to be told on every start that it is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
