"""Checkpoints from and to Hugging Face: one file a family, each a table."""
