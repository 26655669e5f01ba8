"""What happens when a run goes wrong: bad steps, signals, exit status, replay."""
