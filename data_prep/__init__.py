"""From raw text to a prepared dataset, one step a file; `python -m data_prep --help`."""
