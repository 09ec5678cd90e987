"""Tokenizers in Hugging Face's layout: trained here, read by the package, exact both ways."""

import json
import os
import pathlib

import numpy as np
import pytest
import tokenizers

from lm_jax.data.tokenizers.hf import HfTokenizer
from lm_jax.data.tokenizers.load import train_tokenizer
from tests.helpers import TEXTS
from tests.hugging_face import CORPUS, byte_level, save_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_by_regex():
    """In the manner of Llama 3, which cuts words by a pattern of its own."""
    pattern = {"Regex": r" ?\p{L}+| ?\p{N}{1,3}|\s+(?!\S)|\s+| ?[^\s\p{L}\p{N}]+"}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    tree = byte_level()
    tree["model"]["ignore_merges"] = True
    tree["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [cut, tree["pre_tokenizer"] | {"use_regex": False}],
    }
    return tree


def sentencepiece(metaspace):
    """In the manner of Llama 2: a dummy space, and bytes for what has no token."""
    model = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    # Trained on words; how the dummy space comes before a text is set below.
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    tree = json.loads(made.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]
    if metaspace:
        tree["pre_tokenizer"] |= {"prepend_scheme": "first", "split": False}
    else:
        tree["pre_tokenizer"] = None
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        prefix = {"type": "Prepend", "prepend": "▁"}
        tree["normalizer"] = {"type": "Sequence", "normalizers": [prefix, space]}
    return tree


STYLES = {
    "bytes": byte_level,
    "bytes by regex": byte_level_by_regex,
    "sentencepiece": lambda: sentencepiece(metaspace=False),
    "metaspace": lambda: sentencepiece(metaspace=True),
}


@pytest.fixture(scope="module", params=STYLES)
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    special = "<|endoftext|>" if request.param.startswith("bytes") else "<s>"
    return request.param, HfTokenizer.from_folder(
        save_tokenizer(folder, STYLES[request.param](), special)
    )


@pytest.mark.parametrize("text", [*TEXTS, "the <0x41> byte", "low newest lower"])
def test_ids_stand_for_exactly_the_text(trained, text):
    style, tokenizer = trained
    if not style.startswith("bytes") and "▁" in text:
        component = "pre_tokenizer .Metaspace" if style == "metaspace" else "normalizer .Replace"
        with pytest.raises(ValueError, match=f"tokenizer.json: {component}.* changes the text at"):
            tokenizer.encode(text)
        return
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert b"".join(tokenizer.token_bytes(ids)) == text.encode()
    assert tokenizer.decode(ids) == text
    assert tokenizer.separator not in ids


def test_words_of_the_corpus_are_tokens_of_their_own(trained):
    """Otherwise bytes alone would pass the tests above."""
    style, tokenizer = trained
    assert tokenizer.token_bytes(tokenizer.encode(" lower newest")) == [b" lower", b" newest"]
    pieces = tokenizer.token_bytes(tokenizer.encode("é\u20ac"))
    assert pieces == [b"\xc3\xa9" if not style.startswith("bytes") else pieces[0], *pieces[1:]]
    if not style.startswith("bytes"):
        assert tokenizer.encode("\u20ac").tolist() == [3 + 0xE2, 3 + 0x82, 3 + 0xAC]


def test_several_documents_are_encoded_as_each_alone(trained):
    _, tokenizer = trained
    together = tokenizer.encode_all(["low", "", "new lower \n"])
    for ids, text in zip(together, ["low", "", "new lower \n"], strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_tables_separator_and_padding(trained):
    style, tokenizer = trained
    assert tokenizer.separator == (0 if style.startswith("bytes") else 1)
    assert tokenizer.vocab_size == 340
    table = tokenizer.token_bytes(np.arange(340))
    own = tokenizer._library.get_vocab_size()
    assert own < 340 and table[own:] == [b""] * (340 - own)
    special = [0] if style.startswith("bytes") else [0, 1, 2]
    assert [i for i in range(own) if table[i] == b""] == special
    assert len(set(table[len(special) : own])) > own - 60  # "a" is also <0x61>
    assert {bytes((byte,)) for byte in range(256)} <= set(table)


def test_the_ids_are_the_librarys_own(tmp_path):
    tree = byte_level()
    tree["pre_tokenizer"]["add_prefix_space"] = False
    library = tokenizers.Tokenizer.from_str(json.dumps(tree))
    tokenizer = HfTokenizer.from_folder(save_tokenizer(tmp_path, tree, "<|endoftext|>"))
    for text in CORPUS[:1] + TEXTS[:9]:
        assert tokenizer.encode(text).tolist() == library.encode(text).ids


def test_files_of_older_versions(tmp_path):
    """GPT-2's does not say of what type its model is; some cut, fill, frame or shake a text."""
    tree = byte_level()
    plain = HfTokenizer.from_folder(save_tokenizer(tmp_path / "a", tree, "<|endoftext|>"))
    del tree["model"]["type"]
    tree["model"]["dropout"] = 0.9
    tree["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tree["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    frame = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [frame, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    library = tokenizers.Tokenizer.from_str(json.dumps(tree))
    assert library.encode("low").ids[0] == 0 and len(library.encode(CORPUS[0]).ids) == 8
    old = HfTokenizer.from_folder(save_tokenizer(tmp_path / "b", tree, "<|endoftext|>"))
    for text in ("low", CORPUS[0]):
        np.testing.assert_array_equal(old.encode(text), plain.encode(text))
    assert old.content_hash != plain.content_hash and old.identity == plain.identity


def test_what_decides_the_ids_makes_the_identity(tmp_path):
    """Rows that stand for nothing do not."""
    tree = byte_level()

    def made(name, tree, **changes):
        folder = save_tokenizer(tmp_path / name, tree, "<|endoftext|>", **changes)
        return HfTokenizer.from_folder(folder)

    plain = made("plain", tree)
    assert made("padded", tree, vocab_size=384).identity == plain.identity
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    token |= {"id": len(tree["model"]["vocab"]), "content": "<é>"}
    special = {"added_tokens": [*tree["added_tokens"], token | {"special": True}]}
    assert made("special", tree | special).identity == plain.identity
    model, cut = tree["model"], tree["pre_tokenizer"]
    first, second, *merges = model["merges"]
    low, new = (model["vocab"][piece] for piece in ("Ġlow", "Ġnew"))
    others = {
        "added_tokens": {"added_tokens": [*tree["added_tokens"], token | {"special": False}]},
        "merges": {"model": model | {"merges": [second, first, *merges]}},
        "vocabulary": {"model": model | {"vocab": model["vocab"] | {"Ġlow": new, "Ġnew": low}}},
        "model": {"model": model | {"ignore_merges": True}},
        "pre_tokenizer": {"pre_tokenizer": cut | {"use_regex": False}},
        "normalizer": {"normalizer": {"type": "NFC"}},
    }
    for part, changes in others.items():
        other = made(part, tree | changes)
        assert other.identity != plain.identity
        found = other.behaviour()
        assert [name for name, value in plain.behaviour().items() if value != found[name]] == [part]
    separated = HfTokenizer(json.dumps(tree), 339, 340)
    assert separated.identity != plain.identity


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_kind_of_ours_and_its_file_for_the_library_are_one_tokenizer(kind):
    ours = train_tokenizer(kind, CORPUS, 0 if kind == "byte" else 295)
    exported = HfTokenizer(ours.to_library().to_str(pretty=True), 0, ours.vocab_size + 7)
    assert exported.identity == ours.identity
    other = train_tokenizer("bpe", CORPUS, 290)
    assert exported.identity != other.identity


def test_added_tokens_that_are_text(tmp_path):
    tree = byte_level()
    n = len(tree["model"]["vocab"])
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tree["added_tokens"] += [
        token | {"id": n, "content": "    ", "special": False},
        token | {"id": n + 1, "content": "<é>", "special": False},
        token | {"id": n + 2, "content": "<|pad|>", "special": True},
    ]
    tokenizer = HfTokenizer.from_folder(save_tokenizer(tmp_path / "a", tree, "<|endoftext|>"))
    text = "a    <é> <|pad|>"
    ids = tokenizer.encode(text)
    assert n in ids and n + 1 in ids and n + 2 not in ids
    assert tokenizer.decode(ids) == text
    tree["added_tokens"][2]["lstrip"] = True
    tokenizer = HfTokenizer.from_folder(save_tokenizer(tmp_path / "b", tree, "<|endoftext|>"))
    with pytest.raises(ValueError, match="added_tokens, changes the text at character 1, ' <é>'"):
        tokenizer.encode("a <é>")


@pytest.mark.parametrize(
    ("named", "config_ids", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, {}, 1),
        ({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}, {"bos_token_id": 0}, 1),
        ({"bos_token": None, "eos_token": "</s>"}, {}, 2),
        ({"bos_token": None, "eos_token": "</s>"}, {"bos_token_id": 1}, 1),
        ({}, {"bos_token_id": 1, "eos_token_id": 2}, 1),
        ({}, {"eos_token_id": [2, 0]}, 2),
        (None, {"eos_token_id": 2}, 2),
        ({}, {"bos_token_id": 339}, 339),
        ({}, {}, "names no token that begins or ends a text"),
        ({}, {"bos_token_id": 50256}, "separator 50256 is no special token"),
        ({}, {"bos_token_id": 300}, "separator 300 is no special token"),
    ],
)
def test_the_separator_begins_a_text_or_ends_it(tmp_path, named, config_ids, expected):
    folder = save_tokenizer(tmp_path, sentencepiece(metaspace=True), **config_ids)
    if named is None:
        os.remove(folder / "tokenizer_config.json")
    else:
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
    if isinstance(expected, int):
        assert HfTokenizer.from_folder(folder).separator == expected
        return
    with pytest.raises(ValueError, match=expected):
        HfTokenizer.from_folder(folder)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
CHANGED = {
    "lower case": ("normalizer", {"type": "Lowercase"}, "New", r"normalizer \(Lowercase\)"),
    "composed": (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "NFC"}]},
        "e\u0301 low",
        r"normalizer \(NFC\)",
    ),
    "split": (
        "pre_tokenizer",
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "WhitespaceSplit"},
                BYTE_LEVEL | {"use_regex": False},
            ],
        },
        "new low",
        r"pre_tokenizer \(WhitespaceSplit, ByteLevel\)",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_changed_text_names_the_component(tmp_path, case):
    part, value, text, component = CHANGED[case]
    tokenizer = HfTokenizer.from_folder(
        save_tokenizer(tmp_path, byte_level() | {part: value}, "<|endoftext|>")
    )
    unchanged = text.split()[-1].lower()
    assert tokenizer.decode(tokenizer.encode(unchanged)) == unchanged
    with pytest.raises(ValueError, match=f"tokenizer.json: {component} changes the text at char"):
        tokenizer.encode(text)


def test_characters_without_a_token(tmp_path):
    tree = sentencepiece(metaspace=True)
    tree["model"]["byte_fallback"] = False
    tokenizer = HfTokenizer.from_folder(save_tokenizer(tmp_path, tree))
    with pytest.raises(ValueError, match="tokenizer.json: model, .* at character 4, '\u20ac!'"):
        tokenizer.encode("low \u20ac!")


def test_an_unknown_token_that_is_not_there_stops_nothing(tmp_path):
    tree = sentencepiece(metaspace=True)
    tree["model"] |= {"byte_fallback": False, "unk_token": "<nothing>"}
    tokenizer = HfTokenizer.from_folder(save_tokenizer(tmp_path, tree))
    kept, changed = tokenizer.encode_kept(["low", "low \u20ac!"])
    assert kept is not None and changed is None


def test_a_special_token_around_an_added_one_is_part_of_the_identity(tmp_path):
    tree = byte_level()
    n = len(tree["model"]["vocab"])
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tree["added_tokens"].append(token | {"id": n, "content": "<|", "special": False})
    plain = HfTokenizer.from_folder(save_tokenizer(tmp_path / "a", tree, "<|endoftext|>"))
    for name, other in (("<|lo|>", True), ("[PAD]", False)):
        more = token | {"id": n + 1, "content": name, "special": True}
        tree_of = tree | {"added_tokens": [*tree["added_tokens"], more]}
        folder = save_tokenizer(tmp_path / name[1:-1], tree_of, "<|endoftext|>")
        found, text = HfTokenizer.from_folder(folder), f"{name} low"
        assert (found.encode(text).tolist() != plain.encode(text).tolist()) == other
        assert (found.identity != plain.identity) == other


def test_tokenizers_of_another_kind_are_refused(tmp_path):
    def refused(message, tree, **changes):
        with pytest.raises(ValueError, match=message):
            HfTokenizer.from_folder(save_tokenizer(tmp_path, tree, "<|endoftext|>", **changes))

    tree = byte_level()
    words = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    refused("model is of type WordLevel; supported is BPE", tree | {"model": words})
    affix = tree["model"] | {"end_of_word_suffix": "</w>"}
    refused("model is of type BPE with affixes", tree | {"model": affix})
    refused("neither ByteLevel nor Metaspace", tree | {"pre_tokenizer": {"type": "Whitespace"}})
    last = len(tree["model"]["vocab"]) - 1
    refused(f"token of id {last}, which vocab_size={last}", tree, vocab_size=last)
    refused("vocab_size is None", tree, vocab_size=None)
    refused("cannot be read by the tokenizers library", {"version": "1.0"}, bos_token_id=0)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        HfTokenizer.from_folder(pathlib.Path(tmp_path))
