"""Tokenized folder -> memory-mapped store -> schedule -> packed batches."""
