"""One interface to the implementations that are compared."""
