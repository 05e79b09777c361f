"""Benchmarks that compare pack with its peers on one machine; see README.md beside this file."""
