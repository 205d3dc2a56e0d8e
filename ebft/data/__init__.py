"""Calibration text, text that the model writes, and hidden states."""
