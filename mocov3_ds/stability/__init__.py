"""Studies of huge-batch stability: detectors, verdicts, grids, replay, report."""
