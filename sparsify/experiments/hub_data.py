"""Data sets of the hub by their name: the copy in the hub's cache, or one that is fetched there.

A copy that is there is taken as it is: a run that is resumed sees the data that it began with, and nothing is asked of
a network. Files of data are read as in any folder; code that a data set brings is never run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from sparsify.errors import DataFileError, did_you_mean, first_line
from sparsify.experiments.sources import entries

__all__: list[str] = []

OWNERS = {
    "ag_news": "fancyzhx/ag_news",
    "conll2003": "eriktks/conll2003",
    "imagenette": "frgfm/imagenette",
    "imdb": "stanfordnlp/imdb",
    "squad": "rajpurkar/squad",
    "sst2": "stanfordnlp/sst2",
}
"""Full names of data sets that had none of their owner once, and go by the short one still."""


def data_at(source: str | Path, offline: bool = False) -> Path:
    """The file or folder that a user names: a path, or else a data set of the hub ("owner/name", "sst2").

    Args:
        source: as the user wrote it. What is there as a path is that path.
        offline: nothing is fetched.

    Raises:
        DataFileError: it is neither a path that is there, nor a data set that is in the cache or can be fetched.
    """
    path = Path(source).expanduser()
    name = str(source)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or "." in path.suffix:
        return path
    names = [name, *([OWNERS[name]] if name in OWNERS else [])]
    for one in names:
        if (folder := _copy_of(one)) is not None:
            return folder
    near = did_you_mean(path.name, [one.name for one in entries(path.parent)]) if path.parent.is_dir() else ""
    missing = (
        f"{name}: there is no such file or folder, and no data set of the hub of this name in the cache {_hub_cache()}"
    )
    if offline:
        raise DataFileError(f"{missing}; nothing is fetched.{near}")
    try:
        return _fetched(names[-1])
    except Exception as error:  # what is wrong with a network or an account has many types
        raise DataFileError(f"{missing}; fetching it failed: {first_line(error)}.{near}") from error


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _copy_of(name: str) -> Path | None:
    """Folder of the copy in the cache: datasets--OWNER--NAME/snapshots/REVISION, the one that refs/main says."""
    folder = _hub_cache() / f"datasets--{name.replace('/', '--')}"
    if not (folder / "snapshots").is_dir():
        return None
    main = folder / "refs" / "main"
    if main.is_file() and (found := folder / "snapshots" / main.read_text(encoding="utf-8").strip()).is_dir():
        return found
    copies = entries(folder / "snapshots")
    return copies[0] if len(copies) == 1 else None


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(str(snapshot_download(name, repo_type="dataset")))


def names_in_card(folder: Path) -> dict[str, tuple[str, ...]]:
    """Names of the classes by column, as the card of a data set of the hub (README.md) has them.

    Empty where there is no card, or it says none; what cannot be read in it is passed over, as it is prose.
    """
    card = folder / "README.md"
    if not card.is_file():
        return {}
    head = re.match(r"---\r?\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        info = yaml.safe_load(head[1])["dataset_info"] if head else None
    except (yaml.YAMLError, KeyError, TypeError):
        return {}
    found: dict[str, tuple[str, ...]] = {}
    for config in info if isinstance(info, list) else [info]:
        for feature in _dicts_in(config, "features"):
            names = _names(feature.get("dtype")) or _names(feature.get("sequence")) or _names(feature.get("list"))
            if names and isinstance(feature.get("name"), str):
                found.setdefault(feature["name"], names)
    return found


def _dicts_in(value: Any, name: str) -> list[dict[str, Any]]:
    inside = value.get(name) if isinstance(value, dict) else None
    return [one for one in inside if isinstance(one, dict)] if isinstance(inside, list) else []


def _names(value: Any) -> tuple[str, ...]:
    """Names in {"class_label": {"names": {"0": "neg", "1": "pos"}}}, however deep in `dtype` it stands."""
    while isinstance(value, dict) and "class_label" not in value:
        value = value.get("dtype")
    names = value["class_label"].get("names") if isinstance(value, dict) else None
    if isinstance(names, dict) and all(str(number) in {str(key) for key in names} for number in range(len(names))):
        by_number = {str(key): str(name) for key, name in names.items()}
        return tuple(by_number[str(number)] for number in range(len(names)))
    return tuple(map(str, names)) if isinstance(names, list) else ()
