#!/usr/bin/env python3
"""Makes tokenizer_llama2.json (a small SentencePiece-style BPE with byte fallback) and the goldens
that tokenizer_test.cc compares with, from Hugging Face tokenizers.

usage: make_tokenizer_goldens.py TEXT_FILE BYTE_LEVEL_TOKENIZER_JSON
  TEXT_FILE                   what the small vocabulary is trained on (TinyStories, first 1 MB)
  BYTE_LEVEL_TOKENIZER_JSON   the stories-llama tokenizer
Made with tokenizers 0.22.1. (0.23 decodes normalized added tokens to their normalized text and does
not skip such tokens when they are special; we stay with what all versions before did.)
"""
import copy
import json
import pathlib
import random
import sys

import tokenizers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).resolve().parent
BAR = "\u2581"
BYTES = [f"<0x{b:02X}>" for b in range(256)]


def dump(name, value):
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    (HERE / name).write_text(text + "\n")
    print(name, len(text))


def trained_pieces(text):
    """Pieces over words that start with the bar, the most useful first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(BAR, "always", True)
    trainer = trainers.BpeTrainer(vocab_size=1100, show_progress=False, limit_alphabet=90)
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    return sorted(vocab, key=vocab.get)


def llama2(text):
    """Laid out as the conversion of Llama 2: unk, bos, eos, bytes, pieces; every pair of tokens that
    makes a token is a merge, ranked by the token it makes, so several merges make the same one."""
    pieces = trained_pieces(text) + [BAR * n for n in (2, 3, 4, 8, 16)]
    pieces += ["\u00e9", "\u4e2d", "\u6587", "\u4e2d\u6587", "\U0001f600"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>"] + BYTES)}
    first_piece = len(vocab)
    for piece in pieces:
        vocab.setdefault(piece, len(vocab))
    merges = [(piece[:cut], piece[cut:])
              for piece, i in vocab.items() if i >= first_piece
              for cut in range(1, len(piece)) if piece[:cut] in vocab and piece[cut:] in vocab]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    text_a, text_b = ({"Sequence": {"id": s, "type_id": t}} for s, t in (("A", 0), ("B", 1)))
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": t, **flags}
                         for i, t in enumerate(["<unk>", "<s>", "</s>"])],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": BAR},
            {"type": "Replace", "pattern": {"String": " "}, "content": BAR}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, text_a], "pair": [bos, text_a, text_b],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": BAR}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "vocab": vocab,
                  "merges": [f"{left} {right}" for left, right in merges]},
    }


def variants(base):
    """name -> patch of the base, so that the vocabulary is stored once (see apply)."""
    def metaspace(scheme, split):
        return {"normalizer": None, "pre_tokenizer": {
            "type": "Metaspace", "replacement": BAR, "prepend_scheme": scheme, "split": split}}

    def token(i, content, **flags):
        return {"id": i, "content": content, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": False, **flags}

    n = len(base["model"]["vocab"])
    added = base["added_tokens"] + [
        token(n, "<left>", lstrip=True, special=True),
        token(n + 1, "<right>", rstrip=True, special=True),
        token(n + 2, "<both>", lstrip=True, rstrip=True),
        token(n + 3, "word", single_word=True),
        token(n + 4, "norm", normalized=True),
        token(n + 5, "norm ed", normalized=True, special=True),
        token(n + 6, "<|a|>"), token(n + 7, "<|a|><|b|>"), token(n + 8, "a|", special=True),
        token(n + 9, "\u00e9t\u00e9", single_word=True, lstrip=True, rstrip=True)]
    decoders = base["decoder"]["decoders"]
    rename = {"rename": {token: "gone" + token for token in BYTES[0x80:0xC3]}}
    return {
        "llama2": {},
        "metaspace_always": metaspace("always", True),
        "metaspace_first": metaspace("first", False),
        "metaspace_never": metaspace("never", False),
        "metaspace_first_split": metaspace("first", True),
        "added": {"added_tokens": added},
        "added_metaspace": {"added_tokens": added, **metaspace("first", False)},
        "no_byte_fallback": {"model": {"byte_fallback": False}},
        "no_fuse": {"model": {"byte_fallback": False, "fuse_unk": False}},
        "some_bytes": {"model": rename},
        "some_bytes_no_fuse": {"model": {**rename, "fuse_unk": False}},
        "ignore_merges": {"model": {"ignore_merges": True}, **metaspace("always", True)},
        "normalized_specials": {"added_tokens": [{**t, "normalized": True}
                                                 for t in base["added_tokens"]]},
        "no_strip": {"decoder": {"type": "Sequence", "decoders": decoders[:3]}},
        "only_replace": {"decoder": decoders[0]},
        "strip_three": {"decoder": {"type": "Sequence", "decoders": decoders[:3] + [
            {"type": "Strip", "content": " ", "start": 3, "stop": 0}]}},
    }


def apply(base, patch):
    """A patch's "model" is merged into the base's and may rename tokens; the rest replaces."""
    out = copy.deepcopy(base)
    for key, value in patch.items():
        if key != "model":
            out[key] = value
            continue
        rename = value.get("rename", {})
        out["model"].update({k: v for k, v in value.items() if k != "rename"})
        out["model"]["vocab"] = {rename.get(t, t): i for t, i in out["model"]["vocab"].items()}
    return out


HOSTILE = [
    "", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "a", " a", "a ", "  a  b  ", "\0",
    "a\0b", "\0\0\0", "Hello, world!", "hello  world", "It's Tom's dog; they'll've gone.",
    "IT'S TOM'S", "'\u017f long s", "'S 'T 'RE 'VE 'M 'LL 'D 's 't 're 've 'm 'll 'd",
    "12345678901234567890", "1,234.56", "x=1;y=22;z=333;w=4444", BAR, BAR + BAR, "a" + BAR + "b",
    BAR + " " + BAR, " " + BAR, "<s>", "</s>", "<unk>", "<s>hello</s>", " <s> hello </s> ",
    "<s><s></s></s>", "<s", "<0x0A>", "<0xE4><0xB8><0xAD>",
    "[INST] <<SYS>>\nBe good.\n<</SYS>>\n\nHi [/INST] Hello </s>",
    "\u00e9", "e\u0301", "\u00e9t\u00e9", "\u4e2d\u6587", "\u4e2d \u6587", "\u65e5\u672c\u8a9e",
    "\ud55c\uad6d\uc5b4", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e44\u0e17\u0e22", "\U0001f600",
    "\U0001f600\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f44d\U0001f3fd", "\U0001f1e9\U0001f1ea", "\u2764\ufe0f", "a\u0300\u0301\u0302\u0303",
    "Z\u0351\u036b\u0343", "\u200b", "a\u200bb", "\ufeffbom", "\u00a0", "a\u00a0b", "\u3000",
    "\u2003", "a\u180eb \u180e", "\u0085", "\u2028\u2029", "\u202e\u202d", "\x1b[31m", "\x7f",
    "\x01\x02\x03", "\ufffd", "\ufffe\uffff", "\ud7ff\ue000", "\U0010ffff", "\U00010000",
    "\u0130\u0131", "\u00df\u1e9e", "\ufb01\ufb03", "\u212b\u00c5A\u030a", "\u2167", "\u00bd\u00b2",
    "\u0661\u0662\u0663", "\U0001d7d8", "\U00013460\U0002ebf0\U00011bf0 \u1c89x", "word", "word.",
    "sword", "word word", "words word!", "\u00e9word", "_word", "word\u0301", "a <left> b",
    "a<left>b", "  <left>  <left>", "<right>  x", "x <right>", "<both> <both>  <both>",
    " \t<both>\n\n x", "\u3000<both>\u2003y", "norm", "a norm b", "norm ed", "a norm ed", "<|a|>",
    "<|a|><|b|>", "<|a|><|b", "<|a|>a|", "ba|", "<|a<|a|>", " \u00e9t\u00e9 ", "l\u00e9t\u00e9",
    "un \u00e9t\u00e9.", "<both>word<both>", "<right><left>", "<right> <left>",
    "<s> <left>x<right> </s>", "\\n\\t", "{\"a\": [1, 2]}",
    "for (int i = 0; i < n; ++i) {\n\treturn x[i];\n}\n", "https://example.org/a?b=c&d=%20#e",
    "AbCdEf ABC def", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "the the the the", "thethethethe",
    "\u0300", " \u0300", "\u0300 a", "a\0\u00e9\0", "\u00ff\u00fe", "\u0100\u0143\u0144",
    "\u0120the", "\u010a", "x" * 300, " " * 100, "\n" * 50, "\u00e9" * 70, "\U0001f600 " * 40,
    "\t" * 33, "ab" * 150, ("the " * 80).strip(), "1" * 100, "!" * 100, "\0" * 60,
]


def random_strings(rng, count, words):
    anything = [rng.choice([rng.randrange(0x80, 0x800), rng.randrange(0x800, 0xD800),
                            rng.randrange(0xE000, 0x10000), rng.randrange(0x10000, 0x110000)])
                for _ in range(400)]
    pools = [
        [chr(c) for c in range(0x20, 0x7F)],
        [" ", "  ", "\n", "\t", "\r", "\u00a0", "\u3000", BAR, "\0"],
        words,
        ["\u00e9", "\u4e2d", "\u6587", "\U0001f600", "\u0301", "\u200d", "\u05d0", "\ufffd"],
        ["<s>", "</s>", "<unk>", "<left>", "<right>", "<both>", "word", "norm", "<|a|>", "<|b|>",
         "norm ed", "a|", "\u00e9t\u00e9", "<|eot_id|>", "<|begin_of_text|>"],
        [chr(c) for c in anything],
    ]
    out = []
    for _ in range(count):
        weights = [rng.random() ** 3 for _ in pools]
        out.append("".join(rng.choice(rng.choices(pools, weights)[0])
                           for _ in range(rng.randrange(1, 30))))
    return out


def decoded(tokenizer, ids):
    return {"decoded": tokenizer.decode(ids, skip_special_tokens=False),
            "decoded_skip": tokenizer.decode(ids, skip_special_tokens=True)}


def golden(tokenizer, text):
    tokenizer.encode_special_tokens = False
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    with_bos = tokenizer.encode(text, add_special_tokens=True).ids
    assert with_bos[1:] == ids
    tokenizer.encode_special_tokens = True
    plain = tokenizer.encode(text, add_special_tokens=False).ids
    entry = {"text": text, "ids": ids, **decoded(tokenizer, ids)}
    return entry if plain == ids else {**entry, "plain": plain}


def id_lists(rng, tokenizer, count, byte_ids):
    """Decodes of ids that no text gives: broken runs of bytes, specials in between, no such id."""
    size = tokenizer.get_vocab_size()
    out = []
    for _ in range(count):
        ids = []
        length = rng.randrange(1, 14)
        while len(ids) < length:
            kind = rng.random()
            if kind < 0.45:
                character = chr(rng.choice([0x41, 0x20, 0xE9, 0x4E2D, 0x1F600])).encode()
                ids += [byte_ids[b] for b in character[:rng.randrange(1, 5)]]
            elif kind < 0.6:
                ids.append(byte_ids[rng.randrange(256)])
            elif kind < 0.7:
                ids.append(rng.randrange(0, 3))
            else:
                ids.append(rng.randrange(0, size + 2))
        out.append({"ids": ids, **decoded(tokenizer, ids)})
    return out


INVALID = [b"\xff", b"a\xffb", b"\xc3", b"\xc3\xa9\xc3", b"\xe4\xb8", b"\xe4\xb8x",
           b"\xf0\x9f\x98", b"\xf0\x9f\x98\xf0\x9f\x98\x80", b"\xed\xa0\x80", b"\xc0\x80",
           b"\xf4\x90\x80\x80", b"\x80\x80", b"\xe0\x80\x80", b"\xf8\x88\x80\x80\x80",
           b"ok \xe2\x28\xa1 \xfe\xff"]


def adversarial_bpe(rng):
    """Tiny vocabularies with random merges, several to the same token: the order of the heap."""
    out = []
    for _ in range(60):
        alphabet = "abc"[: rng.randrange(1, 4)]
        vocab = {c: i for i, c in enumerate(alphabet)}
        merges = []
        for _ in range(rng.randrange(1, 14)):
            left, right = rng.choice(list(vocab)), rng.choice(list(vocab))
            if len(left + right) <= 8:
                vocab.setdefault(left + right, len(vocab))
                merges.append([left, right])
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(m) for m in merges]))
        texts = ["".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 40)))
                 for _ in range(12)]
        out.append({"vocab": vocab, "merges": merges,
                    "cases": [{"text": t, "ids": tokenizer.encode(t).ids} for t in texts]})
    return out


def classes():
    """Which characters the reference's regex engine takes for letters, numbers, white space."""
    out = {}
    for name in (r"\p{L}", r"\p{N}", r"\s"):
        split = pre_tokenizers.Split(Regex(name), "removed")
        ranges = []
        for base in range(0, 0x110000, 4096):
            points = [c for c in range(base, base + 4096) if not 0xD800 <= c < 0xE000]
            pieces = split.pre_tokenize_str("".join(map(chr, points))) if points else []
            others = {points[i] for _, (begin, end) in pieces for i in range(begin, end)}
            for point in points:
                if point in others:
                    continue
                if ranges and ranges[-1][1] == point - 1:
                    ranges[-1][1] = point
                else:
                    ranges.append([point, point])
        out[name] = ranges
    return out


def main():
    text = pathlib.Path(sys.argv[1]).read_text()[:1_000_000]
    rng = random.Random(20251)
    base = llama2(text)
    dump("tokenizer_llama2.json", base)
    split = text.split()
    words = [" ".join(split[i:i + 3]) for i in range(0, 3000, 7)]
    strings = HOSTILE + random_strings(rng, 160, words)
    # The variants see fewer strings, among them all that hold added tokens.
    some = strings[::4] + [s for s in HOSTILE if any(t in s for t in (
        "<", "word", "norm", "a|", "\u00e9t\u00e9"))]
    goldens = {"tokenizers": tokenizers.__version__, "variants": {}}
    for name, patch in variants(base).items():
        tokenizer = Tokenizer.from_str(json.dumps(apply(base, patch)))
        whole = name == "llama2"
        goldens["variants"][name] = {
            "patch": patch, "strings": [golden(tokenizer, s) for s in (strings if whole else some)],
            "id_lists": id_lists(rng, tokenizer, 100 if whole else 15, range(3, 259))}
    tokenizer = Tokenizer.from_str(json.dumps(base))
    goldens["invalid_utf8"] = [{
        "bytes": list(b), "decoded": b.decode("utf-8", "replace"),
        "ids": tokenizer.encode(b.decode("utf-8", "replace"), add_special_tokens=False).ids}
        for b in INVALID]
    goldens["bpe"] = adversarial_bpe(rng)
    dump("tokenizer_llama2_goldens.json", goldens)

    level = Tokenizer.from_file(sys.argv[2])
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    byte_ids = [level.token_to_id(chr(b if b in printable else next(others))) for b in range(256)]
    dump("tokenizer_byte_level_goldens.json", {
        "strings": [golden(level, s) for s in HOSTILE + random_strings(rng, 160, words)],
        "id_lists": id_lists(rng, level, 150, byte_ids), "classes": classes()})


main()
