"""One file for each family of sharpness: what is computed at a point, streamed as values with errors and a protocol."""
