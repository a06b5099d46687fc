"""Offline steps of the training recipe: mining negatives, teachers' vectors, pruning."""
