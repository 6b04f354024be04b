"""One `Task` per kind of model, the interface to the commands; `experiments/table.py` names them."""
