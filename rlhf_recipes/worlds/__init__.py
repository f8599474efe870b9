"""Embedded worlds, which recipes name by string: data, labelers and true quality without a download."""
