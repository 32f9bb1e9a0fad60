"""Shards -> samples -> batches. Knows sequences and batches, not models: a processor is handed in."""
