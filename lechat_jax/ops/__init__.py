"""The heavy operations, each in the form that a device is fast at."""
