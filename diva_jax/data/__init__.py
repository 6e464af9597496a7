"""Data: records (tar shards, folders, tables, tfds) -> a shuffled, resumable iterator of batches on the host."""
