"""What becomes of a finished encoder? It is loaded, renamed for other programs and exported."""
