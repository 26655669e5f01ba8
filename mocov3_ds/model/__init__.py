"""What is learned: encoder, heads, momentum encoder, loss. Knows no engine and no config."""
