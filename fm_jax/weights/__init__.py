"""Published weights: read, written, and translated between their layouts and ours."""
