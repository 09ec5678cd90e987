"""Sets of TensorFlow Datasets as documents."""

import contextlib
import functools
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm_jax.data import files, shards
from lm_jax.data.shards import Documents

_NAME = re.compile(r"(?P<set>[a-z]\w*)(/[\w.-]+)?(:[\d.*]+)?")
_FEATURES = "tensorflow_datasets.core.features."
_SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev"), "test": ("test",)}


class Prepared(NamedTuple):
    """A set that is there."""

    name: str  # with config and version
    feature: str  # that holds the text
    splits: dict[str, list[Documents]]
    sizes: dict[str, tuple[int, int]]  # examples and bytes of each split, by its own name


def prepared(name: str, data_dir: Path, fetch: bool) -> Prepared:
    """A set of TensorFlow Datasets, downloaded and prepared if it is not there and `fetch` is True.

    Raises:
        ValueError: if it is none of TensorFlow Datasets itself, has no text or no train split, or
            the package is not installed.
        FileNotFoundError: if it is not there and cannot be downloaded, or may not be.
    """
    match = _NAME.fullmatch(name)
    if match is None:  # as huggingface:NAME, whose code TFDS would download
        raise ValueError(
            f"data.corpus='tfds:{name}' names no set of TensorFlow Datasets itself: give "
            "tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION, in lower case."
        )
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ValueError(
            f"data.corpus='tfds:{name}' needs the package tensorflow-datasets: "
            "pip install 'lm_jax[tfds]'."
        ) from error
    _refuse_foreign_code(data_dir / match["set"])
    if not fetch and not (data_dir / match["set"]).is_dir():
        raise _not_prepared(name, data_dir)
    try:
        builder = tensorflow_datasets.builder(name, data_dir=data_dir, file_format="array_record")
    except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
        raise ValueError(
            f"data.corpus='tfds:{name}' is neither a TensorFlow Datasets name nor prepared in "
            f"{data_dir}: correct the name or give its data_dir as --config.data.source_dir."
        ) from error
    if not fetch and not Path(builder.data_dir).is_dir():
        raise _not_prepared(name, data_dir)
    config = tensorflow_datasets.download.DownloadConfig(try_download_gcs=False)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to reports
            builder.download_and_prepare(download_config=config)
    except (OSError, tensorflow_datasets.download.DownloadError) as error:
        raise FileNotFoundError(
            f"data.corpus='tfds:{name}' could not be downloaded ({error}): prepare it elsewhere "
            "with file_format='array_record' and give its data_dir as --config.data.source_dir."
        ) from error
    feature, there = _text_feature(name, builder.info.features), builder.info.splits
    # The first name that is there wins.
    own = {split: n for split, names in _SPLITS.items() for n in reversed(names) if n in there}
    if "train" not in own:
        raise ValueError(
            f"data.corpus='tfds:{name}' has no train split but {sorted(there)}: "
            "choose another data set."
        )
    return Prepared(
        builder.info.full_name,
        feature,
        {split: _pieces(builder, n, feature) for split, n in own.items()},
        {n: (there[n].num_examples, there[n].num_bytes) for n in own.values()},
    )


def _not_prepared(name: str, data_dir: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"data.corpus='tfds:{name}' is not prepared in {data_dir}, and what the record of a run "
        "names is not downloaded: give its data_dir as --config.data.source_dir."
    )


def _refuse_foreign_code(folder: Path) -> None:
    """Raises ValueError if a prepared set has features of other classes than TFDS's own.

    TFDS imports the module of each class that these files name, also from the current folder.
    """
    ways = itertools.product(("*", "*/*"), ("features.json", "dataset_info.json"))
    for path in itertools.chain.from_iterable(folder.glob("/".join(way)) for way in ways):
        with files.naming(path):
            named = sorted(_class_names(json.loads(path.read_bytes())))
        if foreign := [x for x in named if "." in x and not x.startswith(_FEATURES)]:
            raise ValueError(
                f"{path} names the class {foreign[0]!r}, which is none of TensorFlow Datasets and "
                "would be imported: prepare the set with features of its own, such as Text."
            )


def _class_names(value: Any) -> Iterator[str]:
    """The names of classes in a JSON tree of features, which may hold others as text."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(ValueError):
            yield from _class_names(json.loads(value))
    elif isinstance(value, list):
        for part in value:
            yield from _class_names(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(part, str):
                yield part
            else:
                yield from _class_names(part)


def _text_feature(name: str, features: Any) -> str:
    import tensorflow_datasets as tfds

    texts = [key for key, kind in features.items() if isinstance(kind, tfds.features.Text)]
    if "text" in texts:
        return "text"
    if len(texts) == 1:
        return texts[0]
    raise ValueError(
        f"data.corpus='tfds:{name}' has the text features {sorted(texts)}, none of them 'text': "
        "choose a data set with one text feature."
    )


def _pieces(builder: Any, split: str, feature: str) -> list[Documents]:
    """Ranges of examples of about shards.PIECE bytes."""
    info = builder.info.splits[split]
    step = max(1, info.num_examples * shards.PIECE // max(1, info.num_bytes))
    read = functools.partial(_documents, str(builder.data_dir), split, feature)
    examples = range(info.num_examples)
    return [functools.partial(read, examples[first : first + step]) for first in examples[::step]]


def _documents(data_dir: str, split: str, feature: str, examples: range) -> Iterator[str]:
    import tensorflow_datasets

    source = tensorflow_datasets.builder_from_directory(data_dir).as_data_source(split)
    with files.naming(f"Split {split} of {data_dir}"):
        for index in examples:
            yield source[index][feature].decode()
