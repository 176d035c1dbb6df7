"""`python -m data_prep`."""

from __future__ import annotations

import gc

_OBJECTS_BETWEEN_COLLECTIONS = 100_000

if __name__ == "__main__":
    # What is imported and what a tokenizer consists of lives on: with Python's 700 the collector
    # would look through it again and again, for a tenth of the time to start.
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)

    # imported here: a worker process imports this module too, and needs no command line
    from data_prep.app import main

    main()
