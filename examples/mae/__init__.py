"""A masked autoencoder: a ViT that learns from pictures most of which it cannot see."""
