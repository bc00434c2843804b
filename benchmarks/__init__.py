"""Benchmarks of the adapter pack; each lives in a subpackage of its own."""
