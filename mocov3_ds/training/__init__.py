"""What one step is and what one run is."""
