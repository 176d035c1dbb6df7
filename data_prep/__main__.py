"""`python -m data_prep`."""

from __future__ import annotations

if __name__ == "__main__":
    # imported here: a worker process imports this module too, and needs no command line
    from data_prep.app import main

    main()
