"""What fits, how fast and at what cost: arithmetic on architecture and hardware, nothing is run."""
