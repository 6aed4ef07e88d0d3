"""What a model on a stream remembers when it cannot remember everything."""

from anabranch.keep.base import ARC, FIFO, GDSF, LFU, LRU, S3FIFO, Access, Cache, Request, belady, requests
from anabranch.keep.caching_multiplexing import LEC, CachedMultiplexer, Multiplexer
from anabranch.keep.fair_submodular import FairReservoir, FairSwap, FairTwoPass, feasible_set
from anabranch.keep.select import Coverage, FacilityLocation, Laminar, Modular, Sieve, Swap, Weighted

__all__ = [
    "ARC", "FIFO", "GDSF", "LEC", "LFU", "LRU", "S3FIFO", "Access", "Cache", "CachedMultiplexer", "Coverage",
    "FacilityLocation", "FairReservoir", "FairSwap", "FairTwoPass", "Laminar", "Modular", "Multiplexer", "Request",
    "Sieve", "Swap", "Weighted", "belady", "feasible_set", "requests",
]  # fmt: skip
