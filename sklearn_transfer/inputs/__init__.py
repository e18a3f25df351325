"""What came as X, turned into samples and digests. Nothing here imports torch."""
