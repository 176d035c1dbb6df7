"""Everything around the mathematics of a step, one concern a file."""
