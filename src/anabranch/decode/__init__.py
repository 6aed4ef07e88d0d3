"""Emit tokens: draw them, draft and verify them, and store and compute them in fewer bits."""
