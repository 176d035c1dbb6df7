"""Documents out of files of every kind, into shards of documents."""
