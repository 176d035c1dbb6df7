"""`python -m data_prep`."""

from __future__ import annotations

from data_prep.app import main

if __name__ == "__main__":
    main()
