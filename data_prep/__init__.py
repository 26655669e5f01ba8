"""Turn images, however they are stored, into WebDataset shards with a manifest."""
