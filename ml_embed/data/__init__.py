"""Tokenized folder -> memory-mapped store -> schedule -> packed batch."""
