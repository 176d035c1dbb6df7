"""Starting processes and letting them meet; the only reader of the environment."""
