"""Which of llama.cpp's byte-pair pre-tokenizers equals a tokenizer.json.

llama.cpp knows pre-tokenizers by name (``tokenizer.ggml.pre``), not by regular expression. Two
tables find the name: the digest that llama.cpp's own script computes, for published tokenizers,
and the structure of tokenizer.json, for all others. The first wins.

References
----------
llama.cpp 0c1e57098: get_vocab_base_pre in conversion/base.py (text and digests);
llm_tokenizer_bpe and llama_vocab::impl::load in src/llama-vocab.cpp (what each name splits, and
which names ignore merges).
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.errors import ConversionError

# The text whose token ids are hashed; every character of it counts.
_CHECKED_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)

# Digest to name, for published tokenizers of the architectures in converters.architectures.
_DIGESTS = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",  # Llama 3
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "f6791d196f87ce6b56a7d234be618e0d58f8cda3549416635b2bebcd22cd95c4": "midm-2.0",
    "0e9433cbbb161f89e264eb32e8e64bfe69e834973ffca5d41d3948a604a3e2a3": "pixtral",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",  # Mistral Nemo
    "1431a23e583c97432bc230bff598d103ddb5a1f89960c8f1d1051aaa944d0b35": "minerva-7b",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "d4c8f286ea6b520b3d495c4455483cfa2302c0cfcd4be05d781b6a8a0a7cdaf1": "megrez",
    "1994ffd01900cfb37395608534236ecd63f2bd5995d6cb1004dda1af50240f15": "trillion",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
    "a1e163ecab2e718a4c829d1148b6e86824ec36163bb71941c3dca9cd5ac25756": "mellum",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "b3f499bb4255f8ca19fccd664443283318f2fd2414d5e0b040fbdd0cc195d6c5": "deepseek-r1-qwen",
    "b0a6b1c0bd5998ebd9df08611efde34a4ff03faed45ae09c43e6b31ebd4b94cf": "a.x-4.0",
    "862f827721df956049dff5ca81a57f29e575280bc622e290d3bf4e35eca29015": "f2llmv2",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",  # GPT-NeoX
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",  # OLMo 2, Phi 4
    "7dec86086fcc38b66b7bc1575a160ae21cf705be7718b9d5598190d7c12db76f": "superbpe",
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",  # Phi 4 mini
}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = (  # words by case, as in o200k and Tekken; {} is what may follow a word
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    r"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{0}|"
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+"
    r"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{0}|"
)
_LETTERS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_LLAMA3 = _LETTERS + r"\p{N}{1,3}" + _SYMBOLS + _BLANKS
_QWEN2 = _LETTERS + r"\p{N}" + _SYMBOLS + _BLANKS
_QWEN35 = (
    _CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + _BLANKS
)
_TEKKEN = _WORDS.format("") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS
_GPT4O = _WORDS.format(_CONTRACTIONS + "?") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS

# (steps, ignore_merges) to name. Where llama.cpp has several names for one behaviour, the one of
# the architecture that is described here. `ignore_merges` counts: llama.cpp takes it from the name.
_STRUCTURES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_LLAMA3, "bytes"), True): "llama-bpe",
    ((_LLAMA3, "bytes"), False): "dbrx",
    ((_QWEN2, "bytes"), False): "qwen2",
    ((_QWEN35, "bytes"), False): "qwen35",
    ((_TEKKEN, "bytes"), True): "tekken",
    ((_GPT4O, "bytes"), False): "gpt-4o",
    (("gpt-2",), False): "gpt-2",
    (("digits", "gpt-2"), False): "smollm",
}

# llama.cpp adds a BOS token under these names unless the file says otherwise.
ADDS_BOS = frozenset({"llama-bpe", "falcon3", "pixtral", "midm-2.0"})


def pre_tokenizer_name(path: Path, specification: Mapping[str, Any], tokenizer: Any) -> str:
    """Return llama.cpp's name of a byte-pair pre-tokenizer.

    Parameters
    ----------
    path : tokenizer.json, for messages
    specification : its content
    tokenizer : the ``tokenizers.Tokenizer`` made from it

    Raises
    ------
    ConversionError
        llama.cpp has no such pre-tokenizer, or it is not known here.
    """
    ids = tokenizer.encode(_CHECKED_TEXT).ids
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    if digest in _DIGESTS:
        return _DIGESTS[digest]
    pre_tokenizer = specification.get("pre_tokenizer")
    steps = tuple(_step(step) for step in _flat(pre_tokenizer, "pretokenizers"))
    normalizers = [step["type"] for step in _flat(specification.get("normalizer"), "normalizers")]
    ignore_merges = bool(specification["model"].get("ignore_merges"))
    name = _STRUCTURES.get((steps, ignore_merges))
    if name is None or not set(normalizers) <= {"NFC"}:
        raise ConversionError(
            f"{path}: the pre-tokenizer is none that llama.cpp is known to have; got steps "
            f"{list(steps)}, normalizers {normalizers}, ignore_merges {ignore_merges}, digest "
            f"{digest}. If you know its name in llama.cpp, give it as the tokenizer.ggml.pre."
        )
    return "olmo" if name == "gpt-2" and normalizers else name


def _flat(step: Any, members: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [inner for member in step.get(members, []) for inner in _flat(member, members)]
    return [step]


def _step(step: Mapping[str, Any]) -> str:
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "gpt-2" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and step.get("individual_digits"):
        return "digits"
    pattern = step.get("pattern")
    if kind == "Split" and isinstance(pattern, dict) and "Regex" in pattern:
        # these patterns match every character, so keeping matches and removing the rest is
        # the same as isolating them
        if (step.get("behavior"), bool(step.get("invert"))) in (
            ("Isolated", False),
            ("Removed", True),
        ):
            return str(pattern["Regex"])
    return repr(dict(step))
