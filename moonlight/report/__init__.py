"""A page about one run or several compared, from their folders alone. Knows no torch, so it starts at once."""
