"""Prepared token files, and samples as arithmetic over them."""
