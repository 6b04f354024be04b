"""CLIP: training one, and judging one by retrieval and classification."""
