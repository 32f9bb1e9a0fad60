"""Models of other makers in, ours out."""
