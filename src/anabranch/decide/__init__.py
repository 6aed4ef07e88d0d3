"""Policies that act on streams and are told, perhaps much later, how it went."""
