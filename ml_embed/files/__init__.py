"""Everything that touches the disk: atomic writes, locks, memory-mapped arrays, parquet, paths."""
