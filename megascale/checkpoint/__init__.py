"""Sharded checkpoints in a format that knows no layout."""
