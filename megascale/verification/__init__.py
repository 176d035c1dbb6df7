"""Proving that two runs are the same training: layouts against the single process."""
