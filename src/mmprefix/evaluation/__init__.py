"""Predictions over a split: gathered from all ranks, written, scored, drawn and printed."""
