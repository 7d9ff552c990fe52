"""Whether two GGUF files have the same vocabulary."""

import hashlib

from edgeq.runtime.library import load
from edgeq.runtime.model import Model


def vocabulary_digest(model: Model) -> str:
    """Return the SHA-256 of the vocabulary: every token's text in order, and the use of BOS.

    Two files of equal digest give the same meaning to the same token numbers.
    """
    llama = load().llama
    vocab = llama.llama_model_get_vocab(model.handle)
    state = hashlib.sha256(f"{model.n_vocab} {model.adds_bos} {model.bos}\n".encode())
    for token in range(model.n_vocab):
        text = llama.llama_vocab_get_text(vocab, token) or b""
        state.update(len(text).to_bytes(4, "little") + text)
    return state.hexdigest()
