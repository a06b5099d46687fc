"""Model folders on disk: made, read, written, cut."""
