"""What lets a run survive its machines."""
