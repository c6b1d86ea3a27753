"""Building blocks shared by every model. Nothing here knows a model, a checkpoint or (but for stack.py) a mesh."""
