"""Bytes from strangers, read within limits, and bytes that survive kills."""
