"""The tests, in folders named as those they test."""
