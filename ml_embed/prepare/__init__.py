"""Anybody's text -> tokenized folder."""
