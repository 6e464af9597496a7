"""What several architectures use: the transformer, the text tower, and their checkpoints' names and configs."""
