"""Transforms T of W' = W0*T + R, one file a kind."""
