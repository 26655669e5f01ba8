"""What is on disk, and whose it is: whole checkpoints, their mirror, the run folder."""
