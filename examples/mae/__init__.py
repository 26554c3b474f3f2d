"""Masked autoencoders: vision transformers that learn to fill in hidden patches."""
