"""Folders of data in the formats that experiments read."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

Content = str | bytes | None


def written(root: Path, files: Mapping[str, Content]) -> Path:
    """The folder, with the files in it; None makes a folder."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name
        if content is None:
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return root


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def picture(seed: int = 0, form: str = "PNG", size: tuple[int, int] = (8, 6), **options: Any) -> bytes:
    """An image file of one colour and a bright pixel, another one for each seed."""
    image = pytest.importorskip("PIL.Image").new("RGB", size, (seed % 251, seed * 7 % 241, 90))
    image.putpixel((seed % size[0], seed // size[0] % size[1]), (255, 255, 255))
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def class_folders(
    prefix: str = "", count: int = 4, classes: Iterable[str] = ("dog", "cat"), first: int = 0
) -> dict[str, Content]:
    """`count` images in a folder for each class."""
    return {
        f"{prefix}{name}/{number}.png": picture(first + 50 * place + number)
        for place, name in enumerate(classes)
        for number in range(count)
    }


def yolo(
    label: str, count: int = 5, images: str = "images", labels: str = "labels", first: int = 0
) -> dict[str, Content]:
    """`count` images, each with a label file."""
    return {f"{images}/{number}.png": picture(first + number) for number in range(count)} | {
        f"{labels}/{number}.txt": label for number in range(count)
    }
