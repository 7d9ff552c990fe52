"""The model class of lm-evaluation-harness, against whole forward passes and greedy loops."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model
from edgeq.tasks import read_task, score_tasks
from tests import tiny_gguf

os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval, extra `eval`")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from edgeq import harness  # noqa: E402
from edgeq.harness import EdgeqLM  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default")]  # those of lm_eval and what it imports

NATS = 2e-3  # of a sum: keys and values in float16, and batches of other shapes
N_CTX = 96
BOS, EOS = 1, 0


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("harness")
    return {
        "llama": tiny_gguf.write(directory / "llama.gguf", "llama"),
        "no-bos": tiny_gguf.write(directory / "no-bos.gguf", "llama", adds_bos=False),
        "mamba": tiny_gguf.write(directory / "mamba.gguf", "mamba"),
    }


@pytest.fixture(scope="module", params=["llama", "no-bos", "mamba"])
def asked(request, paths):
    """A path and the model class on it."""
    model = EdgeqLM(paths[request.param], n_ctx=N_CTX, n_threads=1)
    yield paths[request.param], model
    model.close()


@pytest.fixture
def slow(asked):
    """A context of its own, asked one whole text at a time."""
    with Model(asked[0], n_ctx=256, n_threads=1) as model:
        yield model


def instances(kind, arguments):
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


def log_softmax(logits):
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


def by_hand(model, tokens, n_scored):
    """Σ ln p of the last tokens of one whole forward pass, and whether each was the likeliest."""
    rows = log_softmax(model.logits(np.array(tokens, np.int32)))[-n_scored - 1 : -1]
    scored = tokens[-n_scored:]
    total = sum(rows[i, token] for i, token in enumerate(scored))
    return total, rows.argmax(axis=1).tolist() == scored


def plain(model, text):
    """Tokens with the BOS of a vocabulary that wants one."""
    return model.tokenize(text).tolist()


def greedy(model, tokens, n):
    """What the model writes, each token from a pass over all that is before it."""
    written = []
    while len(written) < n:
        best = int(model.logits(np.array(tokens + written, np.int32))[-1].argmax())
        if model.ends_text(best):
            break
        written.append(best)
    return written


PAIRS = [
    ("The river", " and the winter"),
    ("The river", " an"),
    ("They made a letter from a stone, and", " the"),
    ("The river", " and then the water of a small light"),
    ("The river ", "winter"),  # the space becomes the continuation's
    ("The river \n", "the"),
    ("", "the water"),
    ("The river", " w"),
    ("The river", " the"),
    (" ", "the"),
    ("The river", " house"),
]


def test_log_likelihood_is_that_of_a_full_forward(asked, slow):
    _path, model = asked
    found = model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    prefix = [] if slow.adds_bos else [BOS]
    for (context, continuation), (score, is_greedy) in zip(PAIRS, found, strict=True):
        whole = plain(slow, context + continuation)
        stripped = context.rstrip()
        n_context = len(plain(slow, stripped))
        tokens = whole if stripped else prefix + whole
        expected = by_hand(slow, tokens, len(whole) - n_context)
        assert (score, is_greedy) == (pytest.approx(expected[0], abs=NATS), expected[1]), context


def test_greedy_continuations_are_known_as_such(asked, slow):
    _path, model = asked
    right, wrong = [], []
    for context in ("The river", "They made a letter", "of water and light, which was"):
        tokens = plain(slow, context)
        written = greedy(slow, tokens, 4)
        assert written, "the model ends at once: choose another context"
        other = [*written[:-1], (written[-1] + 1) % slow.n_vocab]
        right.append((None, tokens, written))
        wrong.append((None, tokens, other))
    found = model._loglikelihood_tokens([*right, *wrong])
    assert [is_greedy for _, is_greedy in found] == [True] * 3 + [False] * 3


def test_long_contexts_lose_their_beginning(asked, slow, caplog):
    _path, model = asked
    context, continuation = tiny_gguf.text(3, 60).rstrip(), " the water"
    whole = plain(slow, context + continuation)
    n_scored = len(whole) - len(plain(slow, context))
    assert len(whole) > N_CTX + 1
    (found,) = model.loglikelihood(instances("loglikelihood", [(context, continuation)]))
    expected = by_hand(slow, whole[-N_CTX - 1 :], n_scored)
    assert found == (pytest.approx(expected[0], abs=NATS), expected[1])
    assert f"1 of 1 texts lost their beginning to n_ctx={N_CTX}" in caplog.text


def test_rolling_is_the_sum_over_windows(asked, slow):
    _path, model = asked
    texts = [("The river and the house.",), (tiny_gguf.text(4, 70),), ("",), ("Water",)]
    found = model.loglikelihood_rolling(instances("loglikelihood_rolling", texts))
    n_windows = []
    for (text,), score in zip(texts, found, strict=True):
        tokens = slow.tokenize(text, add_special=False).tolist()
        stream, total, done = [BOS, *tokens], 0.0, 0
        n_windows.append(math.ceil(len(tokens) / N_CTX))
        while done < len(tokens):  # each token once, the last window with full context
            end = min(done + N_CTX, len(tokens))
            window = stream[max(0, end - N_CTX) : end + 1]
            total += by_hand(slow, window, end - done)[0]
            done = end
        assert score == pytest.approx(total, abs=NATS)
    assert n_windows[0] == 1
    assert n_windows[1] >= 3


def test_a_context_is_decoded_once_and_answers_keep_their_order(paths, monkeypatch):
    model = EdgeqLM(paths["llama"], n_ctx=N_CTX, n_threads=1)
    n_decoded, decode = [], model._model.decode
    monkeypatch.setattr(
        model._model, "decode", lambda *args: n_decoded.append(len(args[0])) or decode(*args)
    )
    contexts = [tiny_gguf.text(seed, 12) for seed in (5, 6)]
    pairs = [(c, e) for e in (" the", " and stone", " house") for c in contexts]
    together = model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert len(n_decoded) == 2
    lengths = [len(model.tok_encode(context)) for context in contexts]
    assert sum(n_decoded) < 1.5 * sum(lengths)
    for pair, answer in zip(pairs, together, strict=True):
        (alone,) = model.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)
        assert answer == (pytest.approx(alone[0], abs=NATS), alone[1])
    model.close()


def test_batches_in_parts_score_the_same(paths, monkeypatch):
    model = EdgeqLM(paths["llama"], n_ctx=N_CTX, n_threads=1)
    requests = instances("loglikelihood", PAIRS)
    expected = model.loglikelihood(requests, disable_tqdm=True)
    for n in (1, 3, 7):
        monkeypatch.setattr(harness, "N_BATCH", n)
        found = model.loglikelihood(requests, disable_tqdm=True)
        for (score, is_greedy), (wanted, same) in zip(found, expected, strict=True):
            assert (score, is_greedy) == (pytest.approx(wanted, abs=NATS), same)
    model.close()


def test_generation_is_greedy_decoding(asked, slow):
    _path, model = asked
    contexts = ["The river", tiny_gguf.text(7, 60), "They made a letter", ""]
    requests = [(c, {"until": [], "max_gen_toks": 12, "do_sample": False}) for c in contexts]
    found = model.generate_until(instances("generate_until", requests))
    for context, text in zip(contexts, found, strict=True):
        tokens = (plain(slow, context) or [BOS])[-(N_CTX - 12) :]
        assert text == slow.detokenize(np.array(greedy(slow, tokens, 12), np.int32))
    assert len(set(found)) > 1


def test_generation_stops_before_the_until_string(asked, slow):
    _path, model = asked
    whole = slow.detokenize(np.array(greedy(slow, plain(slow, "The river"), 12), np.int32))
    assert len(whole) > 6
    ending = whole[4:6]
    for until in (ending, [whole[-1] * 9, ending], ["", ending]):
        settings = {"until": until, "max_gen_toks": 12, "temperature": 0.0, "top_p": 0.9}
        (text,) = model.generate_until(instances("generate_until", [("The river", settings)]))
        assert text == whole.split(ending)[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True}, "do_sample: got True, expected false"),
        ({"temperature": 0.7}, "temperature: got 0.7, expected 0"),
        ({"num_beams": 4}, "num_beams: got 4, expected nothing"),
        ({"until": 3}, "until: got 3, expected a text or a list of texts"),
        ({"max_gen_toks": 0}, "max_gen_toks: got 0, expected a whole number, 1 or more"),
        ({"max_new_tokens": N_CTX}, "96 tokens to generate; n_ctx is 96"),
    ],
)
def test_other_searches_are_refused(asked, settings, message):
    requests = instances("generate_until", [("The river", settings)])
    with pytest.raises(EvaluationError, match=message):
        asked[1].generate_until(requests)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("", ""), "adds no token"),
        (("The river", ""), "the continuation '' of 'The river' adds no token"),
        (("The", tiny_gguf.text(8, 60)), "Give a larger n_ctx"),
    ],
)
def test_continuations_that_cannot_be_scored_are_refused(asked, pair, message):
    with pytest.raises(EvaluationError, match=message):
        asked[1].loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "no file"),
        ({"n_ctxx": 5}, "unknown 'n_ctxx'; known: path, n_ctx"),
        ({"n_ctx": 1}, "n_ctx: got 1, expected a whole number, 2 or more"),
        ({"n_ctx": "many"}, "n_ctx: got 'many'"),
        ({"n_threads": 0}, "n_threads: got 0"),
    ],
)
def test_wrong_settings_are_refused(paths, settings, message):
    with pytest.raises(EvaluationError, match=message):
        EdgeqLM(**{"path": paths["llama"], **settings})


def test_special_tokens_are_read_as_transformers_does(paths):
    model = EdgeqLM(paths["llama"], n_ctx=N_CTX, n_threads=1)
    assert model.prefix_token_id == BOS
    assert model.eot_token_id == EOS
    assert model.tok_encode("<|begin|>the<|end|>") == [BOS, *model.tok_encode("the")[1:], EOS]
    assert model.tok_encode("the", add_special_tokens=False) == model.tok_encode("the")[1:]
    model.close()


# ----------------------------------------------------------------------------------- whole tasks

ENDINGS = [" stone", " light", " house", " small", " green"]  # as many tokens: sums rank as means


@pytest.fixture
def task(tmp_path):
    rng = np.random.RandomState(11)
    items = []
    for i in range(24):
        context = tiny_gguf.text(100 + i, 8).replace("\n", " ").strip()
        chosen = rng.permutation(ENDINGS)[:3].tolist()
        items.append({"context": context, "endings": chosen, "label": int(rng.randint(3))})
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (tmp_path / "items.jsonl").write_text(lines, "utf-8")
    data = {"test": str(tmp_path / "items.jsonl")}
    (tmp_path / "tasks").mkdir()
    text = f"""\
task: edgeq_local
dataset_path: json
dataset_kwargs:
  data_files: {json.dumps(data)}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{endings | map('trim') | list}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    (tmp_path / "tasks" / "edgeq_local.yaml").write_text(text, "utf-8")
    return tmp_path


def expected_accuracy(path, task):
    read = read_task(task / "items.jsonl")
    with Model(path, vocab_only=True) as model:
        assert len({len(model.tokenize(ending)) for ending in ENDINGS}) == 1
    (scores,) = score_tasks(path, [read], n_threads=1)
    accuracy = np.mean([score.is_right for score in scores])
    assert 0 < accuracy < 1
    return accuracy


def test_a_local_task_has_the_accuracy_that_edgeq_finds(task, paths, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task / "cache"))
    manager = TaskManager(include_path=str(task / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="edgeq",
        model_args=f"path={paths['llama']},n_threads=1",
        tasks=["edgeq_local"],
        task_manager=manager,
        bootstrap_iters=0,
    )
    accuracy = found["results"]["edgeq_local"]["acc,none"]
    assert accuracy == expected_accuracy(paths["llama"], task)


def command(*arguments, cache):
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache), "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, "-m", "edgeq.harness", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_the_command_finds_the_model(task, paths):
    arguments = ["--model", "edgeq", "--model_args", f"path={paths['llama']},n_threads=1"]
    arguments += ["--tasks", "edgeq_local", "--include_path", task / "tasks"]
    done = command(*arguments, "--output_path", task / "out", cache=task / "cache")
    assert done.returncode == 0, done.stderr
    (path,) = (task / "out").rglob("results_*.json")
    accuracy = json.loads(path.read_text("utf-8"))["results"]["edgeq_local"]["acc,none"]
    assert accuracy == expected_accuracy(paths["llama"], task)


@pytest.mark.slow
def test_the_command_says_in_one_line_what_is_wrong(task):
    arguments = ["--model", "edgeq", "--model_args", "path=none.gguf", "--tasks", "edgeq_local"]
    done = command(*arguments, "--include_path", task / "tasks", cache=task / "cache")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == "edgeq: none.gguf: no such file. Give the path of a GGUF file."
    assert "Traceback" not in done.stderr
