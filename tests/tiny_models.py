"""Tiny Hugging Face checkpoints of every architecture, the same bytes on every machine.

Weights come from numpy's frozen ``RandomState``, seeded by the tensor's name; vocabularies are
trained on the text below. ``build(name, directory)`` writes the files and returns the float model.
"""

import copy
import hashlib
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from converters.gguf_file import open_gguf

N_VOCAB = 512

TEXT = """\
The quick brown fox jumps over the lazy dog, and the dog doesn't mind. In the year 1984 there were
12345 foxes; by 2024 only 678 were left. She said: "I've never seen anything like it, have you?"
Numbers such as 3.14159, 1,000,000 and 0x1F600 are split into digits or groups of three digits.
def quantize(weights, bits=4):
    scale = max(abs(w) for w in weights) / (2 ** (bits - 1) - 1)
    return [round(w / scale) for w in weights], scale
Der Fuchs läuft über die Straße und grüßt den Hund. Ça va très bien, señor. Привет, как дела?
我想在苹果公司工作，因为我喜欢电脑。日本語の文章もあります。안녕하세요 세계.
Emoji 🚀🙂👍🏽 and symbols ≤ ≥ ± × ÷ € § occur too.   Spaces,\ttabs and


blank lines are part of the text, as are the tokens that stand for them.
"""

# Everything that tokenizers stumble over, in NFC (llama.cpp does not normalize).
CHECK_TEXT = (
    "Hello world! It's 2024, isn't it? HELLO'S THEY'RE  we'Ve 1234567 3.14 x=10**6;\n\n"
    "  def f(x):\n\treturn x + 1  # ok\r\n   \n\n\n trailing   spaces   \t\t end\n"
    "Grüße, ça va, señor; Привет, мир! 你好，世界。日本語テキスト 안녕하세요 ภาษาไทย हिन्दी "
    "🚀🙂👍🏽 👨\u200d👩\u200d👧 e\u0323\u0302 a\u0308\u0332 ≤≥±×÷ «quoted» … — €100 \u00a0nbsp"
    " camelCaseWords ALLCAPS mixedCASE123abc ../path/to_file.txt <|user|> <tag>"
)

CHAT_TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}"


@dataclass(frozen=True)
class Case:
    """How one tiny checkpoint is made."""

    config: str
    settings: dict[str, Any]
    vocabulary: Callable[[Path], dict[str, Any]]
    pre: str = "default"
    dtype: str = "F32"
    files: dict[str, Any] = field(default_factory=dict)
    max_shard_bytes: int | None = None
    oracle: bool = True


@dataclass(frozen=True)
class Tiny:
    """A checkpoint on disk and the same model in memory, in float32."""

    directory: Path
    model: Any


# --- vocabularies --------------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
)
QWEN2 = LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS
)
SPECIAL = ("<|begin|>", "<|end|>", "<|user|>", "<|endoftext|>")


@cache
def _merges(words: tuple[str, ...], n_merges: int) -> tuple[tuple[str, str], ...]:
    counts = Counter(words)
    split = {word: tuple(word) for word in counts}
    merges = []
    for _ in range(n_merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            joined: list[str] = []
            for part in parts:
                if joined and (joined[-1], part) == best:
                    joined[-1] += part
                else:
                    joined.append(part)
            split[word] = tuple(joined)
    return tuple(merges)


def train_merges(words: list[str], n_merges: int) -> list[tuple[str, str]]:
    """Return byte-pair merges, ties broken by spelling; the tokenizers library varies."""
    return list(_merges(tuple(words), n_merges))


def byte_pairs(
    kind: str, *, nfc: bool = False, ignore_merges: bool = False, adds_bos: bool = False
) -> Callable[[Path], dict[str, Any]]:
    """Return a writer of a byte-level BPE; `kind` is a regular expression or gpt-2 or digits."""

    def write(directory: Path) -> dict[str, Any]:
        from tokenizers import (
            AddedToken,
            Regex,
            Tokenizer,
            decoders,
            models,
            normalizers,
            pre_tokenizers,
            processors,
        )

        tokenizer = Tokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if kind == "gpt-2":
            tokenizer.pre_tokenizer = byte_level
        elif kind == "digits":
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
        else:
            split = pre_tokenizers.Split(Regex(kind), behavior="isolated")
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        if nfc:
            tokenizer.normalizer = normalizers.NFC()
        words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = train_merges(words, N_VOCAB - 16 - len(alphabet))
        pieces = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges)])
        vocabulary = {piece: token for token, piece in enumerate(pieces)}
        tokenizer.model = models.BPE(vocabulary, merges, ignore_merges=ignore_merges)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
        tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
        if adds_bos:
            bos = (SPECIAL[0], tokenizer.token_to_id(SPECIAL[0]))
            tokenizer.post_processor = processors.Sequence(
                [
                    processors.ByteLevel(trim_offsets=False),
                    processors.TemplateProcessing(
                        single=f"{SPECIAL[0]} $A",
                        pair=f"{SPECIAL[0]} $A {SPECIAL[0]}:1 $B:1",
                        special_tokens=[bos],
                    ),
                ]
            )
        else:
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.save(str(directory / "tokenizer.json"))
        ids = {text: tokenizer.token_to_id(text) for text in SPECIAL}
        _write_json(
            directory / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIAL[0],
                "eos_token": SPECIAL[1],
                "pad_token": SPECIAL[3],
                "chat_template": CHAT_TEMPLATE,
                "clean_up_tokenization_spaces": False,
                "model_max_length": 512,
            },
        )
        return {
            "bos_token_id": ids[SPECIAL[0]],
            "eos_token_id": ids[SPECIAL[1]],
            "pad_token_id": ids[SPECIAL[3]],
        }

    return write


def gemma_sentencepiece_model(directory: Path) -> dict[str, Any]:
    """Write a tokenizer.model that puts no space in front of a text."""
    return sentencepiece_model(directory, add_dummy_prefix=False)


def sentencepiece_model(directory: Path, *, add_dummy_prefix: bool = True) -> dict[str, Any]:
    """Write tokenizer.model, a SentencePiece BPE with byte fallback, as LLaMA and Gemma have."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=N_VOCAB - 16,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=0.98,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=add_dummy_prefix,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    user, image = N_VOCAB - 16, N_VOCAB - 15
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                "0": {"content": "<unk>", "special": True},
                "1": {"content": "<s>", "special": True},
                "2": {"content": "</s>", "special": True},
                str(user): {"content": "<|user|>", "special": True},
                str(image): {"content": "<tag>", "special": False},
            },
        },
    )
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def byte_fallback_json(directory: Path) -> dict[str, Any]:
    """Write tokenizer.json of a BPE with byte fallback and no tokenizer.model beside it."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        processors,
    )

    space = "\u2581"
    ascii_text = " ".join(line for line in TEXT.splitlines() if line.isascii())
    words = [space + word for word in ascii_text.split(" ") if word]
    merges = train_merges(words, 150)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    characters = sorted(set("".join(words)))
    pieces = dict.fromkeys([*special, *("".join(pair) for pair in merges), *characters])
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(space), normalizers.Replace(" ", space)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(space, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(special[:3])
    tokenizer.add_special_tokens([AddedToken("<|user|>", normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken("<tag>", normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "extra_special_tokens": ["<|user|>"],
        },
    )
    return {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "vocab_size": tokenizer.get_vocab_size(),
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), "utf-8")


# --- models --------------------------------------------------------------------------------------

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": N_VOCAB,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_GENERATION = {
    "generation_config.json": {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "repetition_penalty": 1.1,
    }
}
_CARD = (
    "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- tiny\nbase_model: some/Base-Model\n---\n"
)

CASES: dict[str, Case] = {
    "llama3": Case(
        "LlamaConfig",
        {**_SMALL, "rope_parameters": _LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True},
        byte_pairs(LLAMA3, ignore_merges=True, adds_bos=True),
        pre="llama-bpe",
        files={**_GENERATION, "README.md": _CARD},
    ),
    "llama2": Case(
        "LlamaConfig",
        {
            **_SMALL,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
        sentencepiece_model,
        dtype="BF16",
        max_shard_bytes=1 << 20,
    ),
    "smollm2": Case(
        "LlamaConfig",
        {**_SMALL, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96}
        | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 100000.0}},
        byte_pairs("digits"),
        pre="smollm",
        dtype="BF16",
    ),
    "smollm3": Case(
        "SmolLM3Config",
        {**_SMALL, "num_hidden_layers": 4, "rope_parameters": {"rope_theta": 2000000.0}},
        byte_pairs(LLAMA3, ignore_merges=True),
        pre="llama-bpe",
        dtype="BF16",
    ),
    "mistral": Case(
        "MistralConfig",
        {**_SMALL, "head_dim": 32, "sliding_window": 4096}
        | {"rope_parameters": {"rope_theta": 1000000.0}},
        byte_pairs(TEKKEN, ignore_merges=True, adds_bos=True),
        pre="tekken",
        dtype="F16",
    ),
    "mistral-spm-json": Case(
        "MistralConfig",
        {**_SMALL, "rope_parameters": {"rope_theta": 10000.0}},
        byte_fallback_json,
        dtype="BF16",
    ),
    "mixtral": Case(
        "MixtralConfig",
        {**_SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
        sentencepiece_model,
        dtype="BF16",
    ),
    "qwen2": Case(
        "Qwen2Config",
        {**_SMALL, "tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1000000.0}},
        byte_pairs(QWEN2, nfc=True),
        pre="qwen2",
        dtype="BF16",
        files=_GENERATION,
    ),
    "qwen3": Case(
        "Qwen3Config",
        {
            **_SMALL,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
        byte_pairs(QWEN2, nfc=True),
        pre="qwen2",
        dtype="BF16",
    ),
    "qwen3moe": Case(
        "Qwen3MoeConfig",
        {
            **_SMALL,
            "head_dim": 16,
            "moe_intermediate_size": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        byte_pairs(QWEN2, nfc=True),
        pre="qwen2",
        dtype="BF16",
        max_shard_bytes=200_000,
    ),
    "gemma2": Case(
        "Gemma2Config",
        {**_SMALL, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64},
        gemma_sentencepiece_model,
        dtype="BF16",
    ),
    "gemma3": Case(
        "Gemma3TextConfig",
        {
            **_SMALL,
            "num_hidden_layers": 6,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 64,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "linear",
                    "rope_theta": 1000000.0,
                    "factor": 8.0,
                },
            },
        },
        gemma_sentencepiece_model,
        dtype="BF16",
    ),
    # llama.cpp gives tokens of models named phi3 attributes of their own
    "phi-longrope": Case(
        "Phi3Config",
        {
            **_SMALL,
            "original_max_position_embeddings": 128,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0 + i / 8 for i in range(8)],
                "long_factor": [1.0 + i for i in range(8)],
            },
        },
        sentencepiece_model,
        dtype="BF16",
    ),
    "gpt2": Case(
        "GPT2Config",
        {"vocab_size": N_VOCAB, "n_positions": 512, "n_ctx": 512}
        | {"n_embd": 64, "n_layer": 2, "n_head": 4},
        byte_pairs("gpt-2"),
        pre="gpt-2",
    ),
    "gptneox": Case(
        "GPTNeoXConfig",
        {key: _SMALL[key] for key in _SMALL if key != "num_key_value_heads"}
        | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        byte_pairs("gpt-2", nfc=True),
        pre="olmo",
        dtype="F16",
    ),
    "olmo2": Case(
        "Olmo2Config",
        {**_SMALL, "rope_parameters": {"rope_theta": 500000.0}},
        byte_pairs(LLAMA3),
        pre="dbrx",
    ),
    "stablelm": Case(
        "StableLmConfig",
        {**_SMALL, "use_qkv_bias": True},
        byte_pairs(QWEN2),
        pre="qwen2",
        dtype="F16",
    ),
    "stablelm-head-norms": Case(
        "StableLmConfig",
        {**_SMALL, "qk_layernorm": True},
        byte_pairs(QWEN2),
        pre="qwen2",
        oracle=False,  # the script loses these norms and then refuses its own result
    ),
    "stablelm-parallel": Case(
        "StableLmConfig",
        {**_SMALL, "use_parallel_residual": True}
        | {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        byte_pairs(QWEN2),
        pre="qwen2",
    ),
}


def names() -> list[str]:
    """Return the name of every tiny model."""
    return list(CASES)


def build(name: str, parent: Path) -> Tiny:
    """Write the checkpoint ``parent/Tiny-<name>`` and return it with its model.

    A checkpoint that is there already is replaced.
    """
    import torch
    import transformers

    case = CASES[name]
    directory = parent / f"Tiny-{name}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    ids = case.vocabulary(directory)
    config = getattr(transformers, case.config)(**{**ids, **case.settings, **ids})
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            values = torch.from_numpy(weights(key, tuple(parameter.shape)))
            parameter.copy_(values.to(kinds[case.dtype]))
    stored = copy.deepcopy(model).to(kinds[case.dtype])  # would round the rope frequencies as well
    stored.save_pretrained(directory, max_shard_size=case.max_shard_bytes or "5GB")
    for file, content in case.files.items():
        if isinstance(content, str):
            (directory / file).write_text(content, "utf-8")
        else:
            _write_json(directory / file, content)
    if "generation_config.json" not in case.files:
        (directory / "generation_config.json").unlink(missing_ok=True)
    return Tiny(directory, model.eval())


def weights(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 weights of a parameter: they depend on its name and shape alone."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = random.standard_normal(shape).astype(np.float32)
    if "norm" in name or "ln_" in name:
        return (values * np.float32(0.1) + np.float32(name.endswith("weight"))).astype(np.float32)
    if len(shape) == 1:
        return values * np.float32(0.1)
    if "embed" in name or "wte" in name or "wpe" in name:
        return values * np.float32(0.5)
    return values * np.float32(1 / np.sqrt(shape[-1]))


# --- comparison ----------------------------------------------------------------------------------


def describe_fields(path: Path) -> dict[str, Any]:
    """Return a GGUF's metadata: key to [type, item type, value]; long lists as their digest."""
    described = {}
    for key, entry in sorted(open_gguf(path).fields.items()):
        value = entry.value
        if isinstance(value, list) and len(value) > 32:
            text = json.dumps(value, ensure_ascii=False)
            value = f"{len(value)} items, sha256 {hashlib.sha256(text.encode()).hexdigest()}"
        items = None if entry.item_type is None else entry.item_type.name
        described[key] = [entry.type.name, items, value]
    return described


def digest_tensors(path: Path) -> dict[str, str]:
    """Return every tensor of a GGUF: name to type, shape and SHA-256 of its bytes."""
    model = open_gguf(path)
    return {
        name: f"{tensor.qtype.name} {'x'.join(map(str, tensor.shape))} "
        f"{hashlib.sha256(np.ascontiguousarray(model.read_bytes(name))).hexdigest()}"
        for name, tensor in sorted(model.tensors.items())
    }


def reference_tokens(directory: Path, text: str) -> list[int]:
    """Return the tokens that the checkpoint's own tokenizer makes of a text."""
    import transformers

    if (directory / "tokenizer.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        return list(tokenizer.encode(text))
    return sentencepiece_tokens(directory, text)


def sentencepiece_tokens(directory: Path, text: str) -> list[int]:
    """Return what SentencePiece makes of a text, with the added tokens cut out as they are spelled.

    That is what transformers' LlamaTokenizer did before it was rewritten for tokenizer.json.
    """
    import re

    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    settings = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
    added = {
        entry["content"]: int(token) for token, entry in settings["added_tokens_decoder"].items()
    }
    pattern = "(" + "|".join(re.escape(content) for content in added) + ")"
    tokens = [model.bos_id()] if settings["add_bos_token"] else []
    for part in re.split(pattern, text):
        tokens += [added[part]] if part in added else model.encode(part)
    return tokens


def inputs_of(layer: Any, chunks: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Return what each plain weight sees: a list of (n_tokens, n_in), chunk by chunk."""
    seen: dict[str, list[np.ndarray]] = {}
    for hidden in chunks:
        layer.run(hidden, lambda p: seen.setdefault(p.name, []).append(p.inputs.copy()))
    return seen
