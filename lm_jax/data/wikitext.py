"""WikiText-2 and WikiText-103: one document is one article.

Merity et al. 2016, "Pointer Sentinel Mixture Models", word level with <unk>, CC BY-SA.
"""

import hashlib
import itertools
import re
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lm_jax.data import shards

FILES = {split: f"wiki.{split}.tokens" for split in ("train", "valid", "test")}
HEADING = re.compile(r" = (?!= ).*(?<! =) = \n?")


class Archive(NamedTuple):
    """A published zip file and the folder in it that holds the three splits."""

    url: str
    sha256: str
    folder: str


ARCHIVES = {
    "wikitext2": Archive(
        "https://wikitext.smerity.com/wikitext-2-v1.zip",
        "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
        "wikitext-2",
    ),
    "wikitext103": Archive(
        "https://wikitext.smerity.com/wikitext-103-v1.zip",
        "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        "wikitext-103",
    ),
}


def pieces_of(path: Path) -> list[shards.Documents]:
    """Pieces of a split's file; their articles, end to end, are the file byte for byte."""
    return shards.cut_into_pieces([path], shards.cut_lines, read_articles)


def read_articles(path: Path, first: int, end: int) -> Iterator[str]:
    """The articles that begin in bytes `first` to `end`.

    An article begins at the blank line before a level-one heading, ` = Title = `. A blank line
    must follow as well: formulas and table legends that look like headings have text around them.
    """
    article: list[str] | None = None if first else []  # None: the article began before `first`
    lines = itertools.chain(shards.lines(path, first, path.stat().st_size), [(0, "")] * 2)
    pairs = itertools.pairwise(lines)
    for ((offset, line), (_, heading)), (_, (_, following)) in itertools.pairwise(pairs):
        if not line.strip() and HEADING.fullmatch(heading) and not following.strip():
            if article:
                yield "".join(article)
            if offset >= end:
                return
            article = []
        if article is not None:
            article.append(line)
    if article:
        yield "".join(article)


def download(name: str, cache_dir: Path, fetch: bool) -> Path:
    """Folder with the published files, fetched and checked the first time.

    Raises:
        FileNotFoundError: if the archive cannot be downloaded, or may not be (`fetch`).
        ValueError: if it is not the published one.
    """
    archive = ARCHIVES[name]
    folder = cache_dir / "downloads" / archive.folder
    if folder.is_dir():
        return folder
    if not fetch:
        raise FileNotFoundError(
            f"{folder} is not there, and what the record of a run names is not downloaded: "
            f"give --config.data.source_dir=FOLDER with {', '.join(FILES.values())}."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="partial-") as partial:
        zip_path = Path(partial) / "archive.zip"
        _fetch(archive, zip_path)
        with zipfile.ZipFile(zip_path) as contents:
            for file in FILES.values():
                contents.extract(f"{archive.folder}/{file}", partial)
        (Path(partial) / archive.folder).rename(folder)
    return folder


def _fetch(archive: Archive, path: Path) -> None:
    remedy = (
        "download it elsewhere and give --config.data.source_dir=FOLDER with "
        f"{', '.join(FILES.values())}."
    )
    # The server refuses urllib's own user agent.
    request = urllib.request.Request(archive.url, headers={"User-Agent": "Mozilla/5.0 (lm_jax)"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response, path.open("wb") as file:
            shutil.copyfileobj(response, file, 1 << 20)
    except OSError as error:
        raise FileNotFoundError(
            f"{archive.url} could not be downloaded ({error}): {remedy}"
        ) from error
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != archive.sha256:
        raise ValueError(
            f"{archive.url} has sha256 {sha256} instead of the published {archive.sha256}: {remedy}"
        )
