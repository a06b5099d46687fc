"""Measurements of the fast paths against naive versions of the same work in the same run."""
