"""Gradient descent, momentum and cautious momentum on an ill-conditioned quadratic."""
