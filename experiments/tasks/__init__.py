"""The models that are trained on their own, as commands see them: a `Task` each, named in `experiments/table.py`."""
