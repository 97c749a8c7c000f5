"""What an image of a micro-batch is called: its file, and its id in the annotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def names_of(metas: Sequence[Mapping[str, Any]], data: Any) -> list[str]:
    """ "file (id)" of each image, from mmdet's ``img_metas``; data: the set they are from, wrapped or not.

    The id is left out where the data set has none. Of images that a pipeline has mixed (mosaics), it is the first.
    """
    files = [str(meta.get("filename") or meta.get("ori_filename") or "of no name") for meta in metas]
    wanted = set(files)
    ids = {name: key for name, key in _ids(data) if name in wanted}
    return [f"{name} (id {ids[name]})" if name in ids else name for name in files]


def wrapped(data: Any) -> list[Any]:
    """The data sets inside one of mmdet's wrappers (repeat, concat); none in a plain one."""
    return list(getattr(data, "datasets", None) or ([data.dataset] if hasattr(data, "dataset") else []))


def _ids(data: Any) -> Iterator[tuple[str, Any]]:
    """(file, id) of the images of a data set, wrappers (repeat, concat) included."""
    for part in wrapped(data):
        yield from _ids(part)
    for info in getattr(data, "data_infos", None) or []:
        if isinstance(info, Mapping) and "filename" in info and "id" in info:
            yield str(Path(getattr(data, "img_prefix", None) or "") / info["filename"]), info["id"]
