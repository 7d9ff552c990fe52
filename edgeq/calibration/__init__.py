"""Statistics of the inputs of every weight: importance matrix, means and second moments.

The user's own llama.cpp is the calibrator: it computes the model on the text, and
``edgeq.runtime.observer`` shows the inputs of every weight product. So every architecture that
llama.cpp runs can be calibrated, without torch.

The text is cut into chunks as llama-imatrix does it: tokenized once with what the vocabulary wants
at its start, cut into chunks of equal length (the remainder is dropped), and where the vocabulary
wants a beginning-of-sequence token it replaces the first token of every chunk.

References
----------
llama.cpp 0c1e57098: tools/imatrix/imatrix.cpp, compute_imatrix and collect_imatrix.
"""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from edgeq.calibration.collector import Collector
from edgeq.calibration.statistics import Statistics
from edgeq.errors import CalibrationError
from edgeq.runtime.model import Model, Tokens
from edgeq.runtime.observer import Observer

__all__ = ["Collector", "Statistics", "chunks_of", "collect"]

N_UBATCH = 512  # tokens of one graph, as llama-imatrix; Model's default


def collect(
    model_path: Path | str,
    text: str | Tokens,
    *,
    chunk: int = 512,
    n_chunks: int | None = None,
    hessians: bool | Collection[str] = False,
    output_tensor: bool = False,
    parse_special: bool = False,
    datasets: Sequence[str] = (),
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    directory: Path | None = None,
) -> Statistics:
    """Run the model on a text and sum up the inputs of its weights.

    Parameters
    ----------
    model_path : GGUF file
    text : a text; or (n,) int32 tokens, cut into chunks like a text's; or (n_chunks, chunk) int32
        tokens, each row run as it is
    chunk : tokens of a chunk; for tokens of two dimensions their own length
    n_chunks : at most so many chunks; default all
    hessians : also collect second moments, of all weights or of the named ones
    output_tensor : also observe the output layer (llama-imatrix: ``--process-output``)
    parse_special : read special tokens spelled in `text`, as rendered conversations need
    datasets : names of the texts, to be stored
    n_threads : default: every CPU of this process
    progress : called with (chunks done, chunks in all)
    directory : for second moments of experts, see ``Collector``

    Raises
    ------
    CalibrationError
        The text is too short, the chunk is longer than the model's context, or the model's
        activations are not finite on it.
    RuntimeLibraryError
        llama.cpp refuses the model.
    RecipeError
        There is no room in `directory`.
    """
    collector = Collector(hessians=hessians, directory=directory)
    observer = Observer(collector.add, output_tensor=output_tensor)
    if not isinstance(text, str) and text.ndim == 2:
        chunk = text.shape[1]
    with Model(model_path, n_ctx=chunk, n_threads=n_threads, cb_eval=observer) as model:
        rows = chunks_of(model, text, chunk, parse_special=parse_special)[:n_chunks]
        for done, row in enumerate(rows, start=1):
            model.logits(row)
            if done == 1 and set(collector.times.values()) == {-(-chunk // N_UBATCH)}:
                # no weight is used twice: nothing after the last one is needed
                observer.stop_after = next(reversed(collector.times))
            if progress is not None:
                progress(done, len(rows))
    return collector.statistics(
        datasets=datasets, n_chunks=len(rows), chunk=chunk, skipped=observer.skipped
    )


def chunks_of(
    model: Model, text: str | Tokens, chunk: int, *, parse_special: bool = False
) -> Tokens:
    """Cut a text into chunks as llama.cpp's tools do.

    Parameters
    ----------
    model : its vocabulary tokenizes
    text : a text; (n,) tokens of one; or (n_chunks, chunk) tokens, returned as they are
    chunk : tokens of a chunk
    parse_special : read special tokens spelled in the text

    Returns
    -------
    (n_chunks, chunk) int32, each row beginning with the beginning-of-sequence token if the
    vocabulary wants one; it replaces the token that was there

    Raises
    ------
    CalibrationError
        There is less than one chunk, or the chunk is longer than the model's context.
    """
    if 0 < model.n_ctx_train < chunk:  # 0: only the vocabulary is loaded
        raise CalibrationError(
            f"{model.path}: chunks of {chunk} tokens; the model was trained on at most "
            f"{model.n_ctx_train}. Choose shorter chunks."
        )
    tokens = model.tokenize(text, parse_special=parse_special) if isinstance(text, str) else text
    if tokens.size < chunk or tokens.size == 0:
        raise CalibrationError(
            f"the text has {tokens.size} tokens, expected at least {chunk}, one chunk. "
            "Give more text or choose shorter chunks."
        )
    if tokens.ndim == 2:
        return tokens
    rows = tokens[: len(tokens) // chunk * chunk].reshape(-1, chunk).astype(np.int32)
    if model.adds_bos:
        rows[:, 0] = model.bos
    return rows
