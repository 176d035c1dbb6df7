"""Assembling and running a training, and using what it made."""
