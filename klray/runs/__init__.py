"""What lies on the disk: run folders, checkpoints, records, and where a result comes from."""
