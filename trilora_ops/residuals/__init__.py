"""Residuals R of W' = W0*T + R, one file a kind."""
