"""What a model on a stream remembers when it cannot remember everything."""

from anabranch.keep.base import ARC, FIFO, GDSF, LFU, LRU, S3FIFO, Access, Cache, Request, belady, requests
from anabranch.keep.caching_multiplexing import LEC, CachedMultiplexer, Multiplexer

__all__ = [
    "ARC", "FIFO", "GDSF", "LEC", "LFU", "LRU", "S3FIFO", "Access", "Cache", "CachedMultiplexer", "Multiplexer",
    "Request", "belady", "requests",
]  # fmt: skip
