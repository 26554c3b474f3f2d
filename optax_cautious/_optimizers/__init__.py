"""The named optimizers, one per file."""
