"""Retrieval metrics, the cube of a model's cuts, and mteb's tasks."""
