"""Exact and near duplicates, and text that evaluation sets hold too."""
