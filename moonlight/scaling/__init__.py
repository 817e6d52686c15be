"""Learning rates and scaling laws of Muon and AdamW, measured side by side."""
