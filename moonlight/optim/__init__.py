"""Muon, AdamW, and which parameter goes to which."""
