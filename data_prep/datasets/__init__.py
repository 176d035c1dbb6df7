"""What can be done with prepared datasets, one command a file."""
