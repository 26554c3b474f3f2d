"""The named optimizers, each in a file of its own."""
