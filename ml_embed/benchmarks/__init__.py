"""Measurements of the fast paths against naive versions of the same work, side by side in one
run."""
