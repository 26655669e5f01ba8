"""What is learned: Vision Transformer, heads, momentum encoder, loss. Knows no engine, no config."""
