"""Who is where, and how a tensor is split and reduced over ranks."""
