"""Masked autoencoders: vision transformers that reconstruct masked patches."""
