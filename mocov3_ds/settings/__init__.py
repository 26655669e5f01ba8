"""What a user set: is the word known, and is it the same as before."""
