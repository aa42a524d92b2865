"""Datasets on disk: one NetCDF file each, with a JSON header, written whole or not at all.

`xarray.open_dataset` opens the files as well. What NetCDF cannot hold is carried in JSON: the header
(an attribute of the file), and text with None, NUL or lone surrogates in it (cell by cell, in arrays
marked ``mi_hops_cells="json"``). Token strings of byte-level vocabularies have all of these.

A file ends in a checksum of all before it, which HDF5 takes no notice of: HDF5 reads a damaged file as it
comes, and of some it never stops reading.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mi_hops.result.files import replacing
from mi_hops.result.statistics import to_numpy

if TYPE_CHECKING:
    import xarray as xr

_HEADER = "mi_hops_header"
_CELLS = "mi_hops_cells"
_SEAL = b"\nmi_hops sha256 "
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # NUL and lone surrogates


def write(
    dataset: xr.Dataset,
    path: str | os.PathLike[str],
    *,
    header: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write a dataset and its header; on failure the folder stays as it was.

    Raises:
        FileExistsError: The file exists and `overwrite` is False.
        FileNotFoundError: The folder does not exist.
        ValueError: The name does not end in ``.nc``.
    """
    dataset = _each(dataset.drop_encoding(), _escape)
    dataset = dataset.assign_attrs({_HEADER: json.dumps(dict(header))})
    with replacing(path, suffix=".nc", overwrite=overwrite) as partial:
        image = _image(dataset)
        partial.write_bytes(image + _seal(image))
    return Path(path)


def _seal(image: bytes) -> bytes:
    return _SEAL + hashlib.sha256(image).hexdigest().encode()


def _require_whole(path: Path) -> None:
    """Refuse a file that does not match its checksum; one that xarray wrote anew has none."""
    content = path.read_bytes()
    image, seal = content[: -len(_seal(b""))], content[-len(_seal(b"")) :]
    if seal.startswith(_SEAL) and seal != _seal(image):
        raise ValueError(
            f"{path} is damaged: it does not match its checksum; copy it again or compute it anew"
        )


def _image(dataset: xr.Dataset) -> bytes:
    """The whole file, made in memory: HDF5 itself does not survive a disk that is full."""
    import h5netcdf
    from xarray.backends import H5NetCDFStore

    image = io.BytesIO()
    with h5netcdf.File(image, "w") as file:
        dataset.dump_to_store(H5NetCDFStore(file))
    return image.getvalue()


def read(path: str | os.PathLike[str]) -> tuple[xr.Dataset, dict[str, Any]]:
    """Read what `write` wrote: the dataset, in memory, and the header.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file was not written by `write`, or is damaged.
    """
    import xarray as xr

    # Undecoded times: units such as "seconds" would be turned into time differences.
    undecoded: dict[str, Any] = {"decode_times": False, "decode_timedelta": False}
    with _told(path), xr.open_dataset(path, engine="h5netcdf", **undecoded) as opened:
        dataset = opened.load().drop_encoding()
        header = _header(dataset.attrs.pop(_HEADER))
        return _each(dataset, _unescape), header


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header alone, without reading the variables; raises what `read` raises."""
    import h5netcdf

    with _told(path), h5netcdf.File(path) as file:
        return _header(file.attrs[_HEADER])


def _header(text: str) -> dict[str, Any]:
    header = dict(json.loads(text))
    header["format"] = int(header["format"])
    return header


@contextmanager
def _told(path: str | os.PathLike[str]) -> Iterator[None]:
    """Refuse a file that is not there or damaged before it is read, and any other that cannot be read."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    _require_whole(Path(path))
    try:
        yield
    except Exception as error:  # h5netcdf passes on whatever meets it in a damaged file
        raise ValueError(
            f"{path} is not a result saved by mi_hops ({type(error).__name__}: {error}); "
            "use a file that Result.save wrote"
        ) from error


def storable(array: xr.DataArray) -> xr.DataArray:
    """The array with a type that a file can hold: bool, int, float, text, or objects JSON knows.

    Raises:
        ValueError: It holds anything else.
    """
    if array.dtype.kind == "f" and array.dtype.itemsize == 2:
        array = array.astype(np.float32)
    if array.dtype.kind in "biufUT":
        return array
    if array.dtype.kind == "O":
        items = [item for item in array.values.ravel().tolist() if item is not None]
        if all(isinstance(item, str | bool | int | float) for item in items):
            return array
    raise ValueError(
        f"{array.name!r} holds {array.dtype}; a result takes booleans, integers, floats, text, and "
        "these with None for missing"
    )


def json_copy(mapping: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A plain copy through JSON; paths, dtypes and devices as text, numpy scalars as numbers.

    Raises:
        ValueError: Something in the mapping (`what` it is called) cannot become JSON.
    """

    def plain(value: Any) -> Any:
        of_torch = type(value).__module__.split(".")[0] == "torch"
        if isinstance(value, np.generic | np.ndarray) or (of_torch and hasattr(value, "tolist")):
            return value.tolist()
        if of_torch or isinstance(value, os.PathLike):
            return str(value)
        if isinstance(value, set | frozenset):
            return sorted(value)
        raise TypeError(f"{type(value).__name__} {value!r}")

    try:
        return dict(json.loads(json.dumps(dict(mapping), default=plain)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} has to be JSON: {error}") from error


def _each(dataset: xr.Dataset, change: Callable[[xr.Variable], xr.Variable]) -> xr.Dataset:
    """The dataset with every variable changed, labels included."""
    return type(dataset)(
        {name: change(dataset.variables[name]) for name in dataset.data_vars},
        {name: change(dataset.variables[name]) for name in dataset.coords},
        dataset.attrs,
    )


def _escape(array: xr.Variable) -> xr.Variable:
    """Text that a file cannot hold as it is, as JSON in each cell."""
    if array.dtype.kind not in "OUT":
        return array
    items = array.values.ravel().tolist()
    if all(isinstance(item, str) and not _UNSTORABLE.search(item) for item in items):
        return array.astype(object)
    cells = np.fromiter(map(json.dumps, items), object).reshape(array.shape)
    array = array.copy(data=cells)
    array.attrs[_CELLS] = "json"
    return array


def _unescape(array: xr.Variable) -> xr.Variable:
    attributes: dict[Hashable, Any] = {
        key: value.item() if isinstance(value, np.generic) else value
        for key, value in array.attrs.items()
    }
    if attributes.pop(_CELLS, None) == "json":
        items = [json.loads(cell) for cell in array.values.ravel().tolist()]
        # Objects with lone surrogates are too much for xarray, where pandas keeps its texts in Arrow.
        texts = all(isinstance(item, str) for item in items)
        cells = to_numpy(items) if texts else np.fromiter(items, object)
        array = array.copy(data=cells.reshape(array.shape))
    elif array.dtype.kind in "OT":
        array = array.astype(str)
    array.attrs = attributes
    return array
