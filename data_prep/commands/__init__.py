"""Commands of data_prep that make shards of documents out of files, and recipes of several steps."""
