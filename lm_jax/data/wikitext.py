"""WikiText-2 and WikiText-103 as TensorFlow Datasets builders: one example is one article.

Merity et al. 2016, "Pointer Sentinel Mixture Models", word level with <unk>, CC BY-SA.
"""

import dataclasses
import hashlib
import itertools
import re
import shutil
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import tensorflow_datasets as tfds

FILES = {split: f"wiki.{split}.tokens" for split in ("train", "valid", "test")}
HEADING = re.compile(r" = (?!= ).*(?<! =) = \n?")


@dataclasses.dataclass(frozen=True)
class Archive:
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


class _Articles:
    """Articles in the order of the source files, which their texts add up to byte by byte."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "One example an article."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir: the folder with wiki.{train,valid,test}.tokens."

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            disable_shuffling=True,
            features=tfds.features.FeaturesDict({"title": text, "text": text}),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        source = Path(dl_manager.manual_dir)
        return {split: self._generate_examples(source / name) for split, name in FILES.items()}

    def _generate_examples(self, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for key, (title, text) in enumerate(split_articles(lines)):
                yield key, {"title": title, "text": text}


class WikiText2(_Articles, tfds.core.GeneratorBasedBuilder):
    """2.1M tokens, 600 + 60 + 60 articles."""

    name = "wikitext2"


class WikiText103(_Articles, tfds.core.GeneratorBasedBuilder):
    """103M tokens."""

    name = "wikitext103"


BUILDERS: dict[str, type[tfds.core.GeneratorBasedBuilder]] = {
    cls.name: cls for cls in (WikiText2, WikiText103)
}


def split_articles(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(title, text) of each article.

    An article starts at the blank line before a level-one heading, ` = Title = `. A blank line
    must follow as well: formulas and table legends that look like headings have text around them.
    """
    article: list[str] = []
    for line, following in itertools.pairwise(itertools.chain(lines, [""])):
        after_blank = not article or not article[-1].strip()
        if HEADING.fullmatch(line) and after_blank and not following.strip():
            blank = article[-1:]
            if len(article) > 1:
                yield _titled(article[:-1])
            article = blank
        article.append(line)
    if article:
        yield _titled(article)


def _titled(article: list[str]) -> tuple[str, str]:
    heading = next((line for line in article if HEADING.fullmatch(line)), " =  = ")
    return heading.strip()[2:-2], "".join(article)


def download(name: str, cache_dir: Path) -> Path:
    """Folder with the published files, fetched and checked the first time."""
    archive = ARCHIVES[name]
    folder = cache_dir / "downloads" / archive.folder
    if folder.is_dir():
        return folder
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
