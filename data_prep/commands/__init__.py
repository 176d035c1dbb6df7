"""Commands of data_prep that make shards of documents, and recipes of several steps."""
