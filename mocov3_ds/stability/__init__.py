"""How stable is training at huge batches: grids of runs, detectors, verdicts, pages, forks."""
