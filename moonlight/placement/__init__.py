"""Which rank owns which rows, without torch."""
