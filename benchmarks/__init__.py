"""Benchmarks: each prints one JSON object. They measure; nothing here is a test."""
