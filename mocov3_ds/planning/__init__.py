"""What fits, how fast does it run and what does it cost? Plans by arithmetic alone."""
