"""Using and judging exported models."""
