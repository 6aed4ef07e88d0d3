"""Streaming building blocks that several families share."""
