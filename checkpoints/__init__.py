"""Files of weights, read into named arrays."""
