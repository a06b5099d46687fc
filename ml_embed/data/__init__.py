"""From a folder of tokenized data to packed batches: store, schedule, loader."""
