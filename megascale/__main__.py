"""`python -m megascale`."""

from megascale.cli.main import main

if __name__ == "__main__":
    main()
