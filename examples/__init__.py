"""Example programs that use the library."""
