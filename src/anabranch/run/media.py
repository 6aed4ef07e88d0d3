"""Audio and video as streams of frames of one shape, from files and from raw bytes, in bounded memory."""

import importlib
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

log = logging.getLogger("anabranch.media")
BLOCK = 16_384
"""Samples of each channel that are read from an audio file at once."""


class MediaError(ValueError):
    """A file that cannot be read as audio or video. The message names it."""


class Sound(NamedTuple):
    """One frame of audio."""

    time: float
    """Seconds from the start of the stream to the first sample."""
    samples: Float32[np.ndarray, " frame"]
    """Between -1 and 1; the last frame is filled up with zeros."""
    damaged: int
    """Samples so far that were no finite number, and are 0 here."""


class Picture(NamedTuple):
    """One frame of video."""

    time: float
    """Seconds from the start of the stream, as the file says."""
    pixels: UInt8[np.ndarray, "H W 3"]
    """Red, green, blue."""
    damaged: int
    """Frames so far that could not be decoded, and are left out."""


def audio(path: str | os.PathLike, frame: int, hop: int | None = None, rate: int | None = None) -> Iterator[Sound]:
    """The frames of an audio file: WAV, FLAC, Ogg, MP3, and whatever else libsndfile reads. Channels are averaged.

    Arguments:
        path: the file.
        frame: samples of a frame.
        hop: samples from the start of a frame to the start of the next; by default `frame`, so that none overlap.
        rate: samples a second; what the file has at another rate is resampled, with the same result as at once.

    Raises:
        FileNotFoundError: if there is no such file.
        MediaError: if it is no audio, or is damaged; what came before the damage has been given by then.
        ValueError: if `frame` or `rate` is not positive, or `hop` is not in 1 … frame.
        ImportError: if soundfile, or soxr where it is needed, is not installed.
    """
    hop = _check(frame, hop, rate)
    soundfile = _import("soundfile")
    path = _existing(path)
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise MediaError(f"{path}: not audio: {error}") from None
    try:
        resampler = None
        if rate not in (None, file.samplerate):
            resampler = _import("soxr").ResampleStream(file.samplerate, rate, 1, dtype="float32")
    except BaseException:
        file.close()
        raise
    return _framed(_blocks(path, file, soundfile.LibsndfileError, resampler), rate or file.samplerate, frame, hop)


def _blocks(path: str, file: Any, failure: type[Exception], resampler: Any) -> Iterator[np.ndarray]:
    with file:
        while True:
            at = file.tell()
            try:
                block = file.read(BLOCK, dtype="float32", always_2d=True)
            except failure as error:
                raise MediaError(f"{path}: damaged after {at / file.samplerate:.3f} s: {error}") from None
            samples = block.mean(1)
            yield samples if resampler is None else resampler.resample_chunk(samples, last=not len(samples))
            if not len(samples):
                return


def pcm(
    chunks: Iterable[bytes], rate: int, width: Literal[16, 32], frame: int, hop: int | None = None
) -> Iterator[Sound]:
    """The frames of raw little-endian PCM of one channel, as microphones and sockets send it.

    Chunks may be split anywhere, also within a sample. No more is held than one chunk and one frame.

    Arguments:
        chunks: the bytes.
        rate: samples a second.
        width: bits of a sample: 16 for signed integers, 32 for floats.
        frame: samples of a frame.
        hop: samples from the start of a frame to the start of the next; by default `frame`, so that none overlap.

    >>> next(pcm([b"\\x00\\x40\\x00", b"\\xc0"], rate=8000, width=16, frame=2)).samples.tolist()
    [0.5, -0.5]

    Raises:
        ValueError: if `width` is not 16 or 32, `frame` or `rate` is not positive, or `hop` is not in 1 … frame.
    """
    hop = _check(frame, hop, rate)
    if width not in (16, 32):
        raise ValueError(f"width must be 16 or 32 bits, got {width}")
    return _framed(_decoded(chunks, width), rate, frame, hop)


def _decoded(chunks: Iterable[bytes], width: int) -> Iterator[np.ndarray]:
    size, rest = width // 8, b""
    for chunk in chunks:
        data = rest + chunk
        whole = len(data) - len(data) % size
        rest = data[whole:]
        if width == 16:
            yield np.frombuffer(data[:whole], "<i2").astype(np.float32) / 32768
        else:
            yield np.frombuffer(data[:whole], "<f4").astype(np.float32)
    if rest:
        log.warning("the stream ended within a sample: %d bytes are left out", len(rest))


def _framed(blocks: Iterable[np.ndarray], rate: int, frame: int, hop: int) -> Iterator[Sound]:
    """Frames of one length from blocks of any; the last is filled up if it holds samples that no other does."""
    held, number, damaged = np.zeros(0, np.float32), 0, 0
    for block in blocks:
        finite = np.isfinite(block)
        damaged += int((~finite).sum())
        held = np.concatenate([held, np.where(finite, block, np.float32(0))])
        start = 0
        while start + frame <= len(held):
            yield Sound(number * hop / rate, held[start : start + frame].copy(), damaged)
            number, start = number + 1, start + hop
        held = held[start:]
    if len(held) > (frame - hop if number else 0):
        yield Sound(number * hop / rate, np.pad(held, (0, frame - len(held))), damaged)


def video(path: str | os.PathLike, size: tuple[int, int] | None = None, every: int = 1) -> Iterator[Picture]:
    """The frames of the first video stream of a file, in the order in which they are shown.

    A frame that is damaged is left out, counted, and logged when the file ends; the rest goes on.

    Arguments:
        path: the file: MP4, MKV, WebM, and whatever else FFmpeg reads.
        size: height and width that frames are scaled to; by default their own.
        every: give only every so-manieth frame.

    Raises:
        FileNotFoundError: if there is no such file.
        MediaError: if it holds no video.
        ValueError: if `every`, or a number of `size`, is not positive.
        ImportError: if PyAV is not installed.
    """
    if every < 1:
        raise ValueError(f"every must be positive, got {every}")
    if size is not None and min(size) < 1:
        raise ValueError(f"size must be a positive height and width, got {size}")
    av = _import("av")
    path = _existing(path)
    try:
        container = av.open(path)
    except av.FFmpegError as error:
        raise MediaError(f"{path}: not video: {error}") from None
    if not container.streams.video:
        container.close()
        raise MediaError(f"{path}: there is no video in it")
    return _pictures(path, container, av.FFmpegError, size, every)


def _pictures(path: str, container: Any, failure: type[Exception], size, every: int) -> Iterator[Picture]:
    with container:
        stream = container.streams.video[0]
        height, width = (None, None) if size is None else size
        number = damaged = 0
        for shown in _frames(container, stream, failure):
            if shown is None or shown.is_corrupt:
                damaged += 1
                continue
            if number % every == 0:
                pixels = shown.reformat(width, height, format="rgb24").to_ndarray()
                time = number / float(stream.average_rate) if shown.time is None else shown.time
                yield Picture(time, pixels, damaged)
            number += 1
    if damaged:
        log.warning("%s: %d damaged frames of %d are left out", path, damaged, number + damaged)


def _frames(container: Any, stream: Any, failure: type[Exception]) -> Iterator[Any]:
    """The decoded frames; None for each packet that cannot be decoded."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
            if packet is None:
                return
            frames = packet.decode()
        except failure:
            yield None
            continue
        yield from frames


def _check(frame: int, hop: int | None, rate: int | None) -> int:
    hop = frame if hop is None else hop
    if frame < 1:
        raise ValueError(f"frame must be positive, got {frame}")
    if not 1 <= hop <= frame:
        raise ValueError(f"hop must be in 1 … frame, got {hop} with a frame of {frame}")
    if rate is not None and rate < 1:
        raise ValueError(f"rate must be positive, got {rate}")
    return hop


def _existing(path: str | os.PathLike) -> str:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)}")
    return os.fspath(path)


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(f"this needs {name}: pip install 'anabranch[media]'") from None
