"""Audio and video: frames against what the libraries read at once, bytes split anywhere, files that are damaged."""

import itertools
import sys

import numpy as np
import pytest

from anabranch.run.media import MediaError, audio, pcm, video

RATE = 16_000


@pytest.fixture(scope="module")
def soundfile():
    return pytest.importorskip("soundfile")


@pytest.fixture(scope="module")
def av():
    return pytest.importorskip("av")


@pytest.fixture(scope="module")
def sine(soundfile, tmp_path_factory):
    """A second and a bit of two channels: 440 Hz, and the same at half the height."""
    path = tmp_path_factory.mktemp("audio") / "sine.wav"
    left = np.sin(2 * np.pi * 440 * np.arange(20_001) / RATE).astype(np.float32)
    soundfile.write(path, np.stack([left, left / 2], axis=1), RATE, subtype="FLOAT")
    return path, (left + left / 2) / 2


@pytest.fixture(scope="module")
def clip(av, tmp_path_factory):
    """20 frames of 48 x 64, ten a second; frame i has the colour (10 i, 100, 250 - 10 i) everywhere."""
    path = tmp_path_factory.mktemp("video") / "clip.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=10, width=64, height=48, pix_fmt="rgb24")
        for i in range(20):
            pixels = np.broadcast_to(np.array([10 * i, 100, 250 - 10 * i], np.uint8), (48, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())
    return path


def overlapped(sounds, hop):
    """The stream that frames were cut from."""
    out = np.zeros(hop * (len(sounds) - 1) + len(sounds[-1].samples), np.float32)
    for i, sound in enumerate(sounds):
        out[i * hop : i * hop + len(sound.samples)] = sound.samples
    return out


@pytest.mark.parametrize("frame, hop", [(400, None), (400, 160), (20_001, None), (30_000, None), (1, None)])
def test_audio_frames_are_the_file(sine, frame, hop):
    path, expected = sine
    sounds = list(audio(path, frame, hop))
    step = hop or frame
    assert all(sound.samples.shape == (frame,) and sound.samples.dtype == np.float32 for sound in sounds)
    assert [sound.time for sound in sounds] == [i * step / RATE for i in range(len(sounds))]
    found = overlapped(sounds, step)
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-7)
    assert len(found) - len(expected) < step and not found[len(expected) :].any()


@pytest.mark.parametrize("rate", [8000, 22_050, 48_000])
def test_resampled_in_blocks_as_at_once(sine, rate):
    soxr = pytest.importorskip("soxr")
    path, whole = sine
    expected = soxr.resample(whole, RATE, rate)
    found = overlapped(list(audio(path, 100, rate=rate)), 100)
    np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-5)
    assert not found[len(expected) :].any() and len(found) - len(expected) < 100


@pytest.mark.parametrize("width", [16, 32])
def test_pcm_may_be_split_anywhere(width):
    rng = np.random.default_rng(width)
    expected = rng.uniform(-1, 1, 5000).astype(np.float32)
    data = (expected * 32768).astype("<i2").tobytes() if width == 16 else expected.astype("<f4").tobytes()
    cuts = np.sort(rng.integers(0, len(data) + 1, 700)).tolist()
    chunks = [data[a:b] for a, b in itertools.pairwise([0, *cuts, len(data)])]
    found = overlapped(list(pcm(chunks, RATE, width, 256, 100)), 100)
    np.testing.assert_allclose(found[:5000], expected, atol=1e-4 if width == 16 else 0)
    assert not found[5000:].any()


@pytest.mark.parametrize("samples, frames", [(0, 0), (399, 1), (400, 1), (401, 2), (880, 4), (881, 5)])
def test_the_last_frame_holds_something_new(samples, frames):
    assert len(list(pcm([bytes(2 * samples)], RATE, 16, 400, 160))) == frames


def test_pcm_is_read_as_it_comes():
    """From a stream without end."""
    taken = 0

    def microphone():
        nonlocal taken
        while True:
            taken += 1
            yield b"\x00\x40" * 50 + b"\x00"
            yield b"\x40"

    sounds = list(itertools.islice(pcm(microphone(), RATE, 16, 100), 3))
    assert all((sound.samples == 0.5).all() for sound in sounds) and taken <= 6


def test_samples_that_are_no_numbers_are_silence_and_counted():
    samples = np.array([0.5, np.nan, 0.5, np.inf, -np.inf, 0.5], "<f4")
    sounds = list(pcm([samples.tobytes()[:14], samples.tobytes()[14:]], RATE, 32, 2))
    assert [sound.samples.tolist() for sound in sounds] == [[0.5, 0.0], [0.5, 0.0], [0.0, 0.5]]
    assert sounds[-1].damaged == 3


def test_a_stream_that_ends_within_a_sample_says_so(caplog):
    sounds = list(pcm([b"\x00\x40\x00"], RATE, 16, 1))
    assert len(sounds) == 1 and "ended within a sample: 1 bytes" in caplog.text


def test_video_frames_are_the_file(clip):
    pictures = list(video(clip))
    assert len(pictures) == 20
    for i, picture in enumerate(pictures):
        assert picture.time == pytest.approx(i / 10, abs=1e-3) and picture.damaged == 0
        assert picture.pixels.shape == (48, 64, 3) and picture.pixels.dtype == np.uint8
        assert (picture.pixels == [10 * i, 100, 250 - 10 * i]).all()


def test_video_in_another_size_and_fewer_frames(clip):
    pictures = list(video(clip, size=(24, 16), every=3))
    assert [picture.time for picture in pictures] == pytest.approx([0.0, 0.3, 0.6, 0.9, 1.2, 1.5, 1.8], abs=1e-3)
    assert all(picture.pixels.shape == (24, 16, 3) for picture in pictures)
    assert abs(int(pictures[2].pixels[12, 8, 0]) - 60) <= 2


def test_damaged_frames_are_left_out_and_counted(clip, av, tmp_path, caplog):
    with av.open(str(clip)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    data = bytearray(clip.read_bytes())
    for i in (5, 6, 12):
        at = data.index(packets[i])
        data[at : at + len(packets[i])] = bytes(len(packets[i]))
    path = tmp_path / "damaged.mov"
    path.write_bytes(data)
    pictures = list(video(path))
    shown = [int(picture.pixels[0, 0, 0]) // 10 for picture in pictures]
    assert shown == [i for i in range(20) if i not in (5, 6, 12)]
    assert [picture.time for picture in pictures] == pytest.approx([i / 10 for i in shown], abs=1e-3)
    assert pictures[4].damaged == 0 and pictures[5].damaged == 2 and pictures[-1].damaged == 3
    assert f"{path}: 3 damaged frames of 20 are left out" in caplog.text


def test_files_that_cannot_be_used_are_named(sine, soundfile, av, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("these are words")
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.wav"):
        audio(tmp_path / "nothing.wav", 100)
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.mp4"):
        video(tmp_path / "nothing.mp4")
    with pytest.raises(MediaError, match=r"notes\.txt: not audio"):
        audio(text, 100)
    with pytest.raises(MediaError, match=r"notes\.txt: not video"):
        video(text)
    with pytest.raises(MediaError, match=r"sine\.wav: there is no video"):
        video(sine[0])


def test_audio_that_is_damaged_further_on_is_given_up_to_there(soundfile, tmp_path):
    path = tmp_path / "noise.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 100_000), RATE)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    sounds = []
    with pytest.raises(MediaError, match=r"noise\.flac: damaged after \d"):
        for sound in audio(path, 1000):
            sounds.append(sound)
    assert 10 < len(sounds) < 60


def test_bad_settings_are_named(sine, clip, monkeypatch):
    with pytest.raises(ValueError, match=r"hop.*500"):
        audio(sine[0], 400, 500)
    with pytest.raises(ValueError, match=r"frame.*0"):
        pcm([], RATE, 16, 0)
    with pytest.raises(ValueError, match=r"width.*24"):
        pcm([], RATE, 24, 100)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"rate.*-1"):
        audio(sine[0], 400, rate=-1)
    with pytest.raises(ValueError, match=r"every.*0"):
        video(clip, every=0)
    with pytest.raises(ValueError, match=r"size.*0, 5"):
        video(clip, size=(0, 5))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"anabranch\[media\]"):
        video(clip)


def test_real_speech(soundfile, data):
    pytest.importorskip("soxr")
    path = data / "speech" / "test.wav"
    whole, rate = soundfile.read(path, dtype="float32")
    sounds = list(audio(path, 480))
    np.testing.assert_array_equal(overlapped(sounds, 480)[: len(whole)], whole)
    assert rate == RATE and len(sounds) == -(-len(whole) // 480)
    slower = list(audio(path, 240, rate=8000))
    assert len(slower) == -(-len(whole) // 480)
    loud = lambda sounds: np.array([np.square(sound.samples).mean() for sound in sounds])
    assert np.corrcoef(loud(sounds), loud(slower))[0, 1] > 0.9  # most of speech is below 4 kHz


@pytest.mark.parametrize("name, shape", [("bigbuckbunny.mp4", (720, 1280, 3)), ("carphone_pristine.mp4", None)])
def test_real_video(av, data, name, shape):
    path = data / "video" / name
    pictures = list(itertools.islice(video(path), 30))
    times = [picture.time for picture in pictures]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        seconds = 1 / float(stream.average_rate)
        shape = shape or (stream.height, stream.width, 3)
    assert all(picture.pixels.shape == shape for picture in pictures) and pictures[-1].damaged == 0
    np.testing.assert_allclose(np.diff(times), seconds, rtol=0.1)
    changes = [np.abs(a.pixels.astype(int) - b.pixels).mean() for a, b in itertools.pairwise(pictures)]
    assert 0 < np.median(changes) < 40  # neighbours are alike, not equal
