"""Benchmarks: a mock upstream, a load generator, a run side by side, and micro benchmarks.

`mock_upstream` and `load` work with any OpenAI-compatible server and import nothing of the proxy.
"""
