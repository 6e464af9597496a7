"""Data: records (tar shards, folders, tfds) -> a shuffled, resumable iterator of uint8 crops on the host."""
