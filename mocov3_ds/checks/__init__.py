"""What `doctor.py` examines, one module for each concern; each check returns findings."""
