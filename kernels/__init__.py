"""Arithmetic of a gated mixture-of-experts layer: routing under a gate, and the experts' feed-forward networks."""
