"""Several steps as one: a YAML file, checked as a whole before anything runs."""
