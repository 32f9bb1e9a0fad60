"""Training with Lightning: the module, its optimiser, checkpoints and callbacks. Knows no masks: batches bring plans."""
