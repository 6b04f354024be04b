"""Recipes: `python -m experiments.recipes.…`. Each docstring lists command, hardware, time and expected result."""
