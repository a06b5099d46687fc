"""Everything that touches the disk: atomic writes, locks, mapped arrays, parquet, paths."""
