"""Text: tokenizers, and the encoders of the published systems."""
