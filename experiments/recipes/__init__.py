"""Recipes: `python -m experiments.recipes.…`. Each docstring has command, hardware, time and expected result."""
