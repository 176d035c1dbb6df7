"""Passes of a step on CPU in C++, compiled where they run; torch does the same without them."""
