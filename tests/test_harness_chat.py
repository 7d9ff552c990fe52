"""Chat templates of the harness's model class, against those that transformers renders."""

import json
import os

import pytest
from gguf.constants import GGUFValueType

from converters.gguf_file import Field, TensorSource, open_gguf, write_gguf
from edgeq.errors import EvaluationError
from tests import tiny_gguf, tiny_models

os.environ["HF_DATASETS_OFFLINE"] = "1"
lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval, extra `eval`")
from lm_eval.tasks import TaskManager  # noqa: E402

from edgeq.harness import EdgeqLM  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default")]  # those of lm_eval and what it imports

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{% endfor %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML
)
USER = {"role": "user", "content": "Is 2 prime? "}
SYSTEM = {"role": "system", "content": "Be short."}
START = {"role": "assistant", "content": "The answer is "}


def with_templates(path, **templates):
    """Write a tiny file with these templates; that called `default` has no name."""
    plain = open_gguf(tiny_gguf.write(path.with_suffix(".plain"), "llama"))
    own = {
        "tokenizer.chat_template" + ("" if name == "default" else f".{name}"): Field(
            text, GGUFValueType.STRING
        )
        for name, text in templates.items()
    }
    sources = [
        TensorSource(name, info.qtype, info.shape, lambda name=name: plain.read_bytes(name))
        for name, info in plain.tensors.items()
    ]
    write_gguf(path, {**plain.fields, **own}, sources)
    return path


@pytest.fixture
def asked(tmp_path):
    """Return a function that opens a model with these templates."""
    opened = []

    def ask(**templates):
        path = with_templates(tmp_path / "chat.gguf", **templates)
        opened.append(EdgeqLM(path, n_ctx=96, n_threads=1))
        return opened[-1]

    yield ask
    for model in opened:
        model.close()


@pytest.mark.parametrize("template", [CHATML, PLAIN])
@pytest.mark.parametrize(
    ("chat", "opens_answer"),
    [([USER], True), ([SYSTEM, USER], True), ([USER, START], False), ([USER], False)],
)
def test_chats_are_rendered_as_transformers_does(template, chat, opens_answer, asked, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        tiny_models.build("llama3", tmp_path).directory
    )
    expected = tokenizer.apply_chat_template(
        chat,
        tokenize=False,
        chat_template=template,
        add_generation_prompt=opens_answer,
        continue_final_message=not opens_answer,
    )
    model = asked(default=template)
    assert model.apply_chat_template(chat, add_generation_prompt=opens_answer) == expected


def test_the_beginning_of_a_text_is_not_doubled(asked):
    model = asked(default=CHATML)
    tokens = model.tok_encode(model.apply_chat_template([USER]))
    assert tokens.count(model.prefix_token_id) == 1
    assert tokens[0] == model.prefix_token_id


def test_a_template_is_chosen_by_its_name(asked):
    model = asked(default=CHATML, short=PLAIN)
    assert model.chat_template(True) == CHATML
    assert model.chat_template("short") == PLAIN
    assert model.apply_chat_template([USER]) == "[user] Is 2 prime?"
    assert model.chat_template(False) is None
    with pytest.raises(EvaluationError, match="no usable chat template 'long', expected one"):
        model.chat_template("long")


def test_a_refused_system_message_is_left_out_and_told(asked, caplog):
    model = asked(default=NO_SYSTEM)
    for _ in range(2):
        assert model.apply_chat_template([SYSTEM, USER]) == model.apply_chat_template([USER])
    assert caplog.text.count("refuses system messages; they are left out") == 1


def test_what_cannot_be_rendered_is_refused(asked):
    with pytest.raises(EvaluationError, match="got no usable chat template, expected one"):
        asked().apply_chat_template([USER])
    with pytest.raises(EvaluationError, match=r"its chat template failed: .*TemplateSyntaxError"):
        asked(default="{% if").apply_chat_template([USER])
    with pytest.raises(EvaluationError, match="does not show the last message, 'Is 2 prime"):
        asked(default="nothing").apply_chat_template([USER], add_generation_prompt=False)


def test_the_name_of_the_cache_is_a_file_name(asked):
    assert "/" not in asked(default=CHATML).tokenizer_name


@pytest.mark.parametrize("is_multiturn", [False, True])
def test_a_task_in_chats(is_multiturn, tmp_path, monkeypatch):
    """The contexts that the harness asks about are whole chats, examples included."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    items = [{"q": f"Which is {i}?", "endings": [" light", " stone"], "a": i % 2} for i in range(4)]
    for split in ("train", "test"):
        lines = "".join(json.dumps(item) + "\n" for item in items)
        (tmp_path / f"{split}.jsonl").write_text(lines, "utf-8")
    data = {split: str(tmp_path / f"{split}.jsonl") for split in ("train", "test")}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "edgeq_chat.yaml").write_text(
        f"""\
task: edgeq_chat
dataset_path: json
dataset_kwargs:
  data_files: {json.dumps(data)}
training_split: train
test_split: test
fewshot_split: train
fewshot_config:
  sampler: first_n
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{endings}}}}"
doc_to_target: a
""",
        "utf-8",
    )
    path = with_templates(tmp_path / "chat.gguf", default=CHATML)
    found = lm_eval.simple_evaluate(
        model="edgeq",
        model_args=f"path={path},n_threads=1",
        tasks=["edgeq_chat"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        num_fewshot=1,
        system_instruction="Be short.",
        apply_chat_template=True,
        fewshot_as_multiturn=is_multiturn,
        log_samples=True,
        bootstrap_iters=0,
    )
    assert found["results"]["edgeq_chat"]["acc,none"] in (0, 0.25, 0.5, 0.75, 1)
    sample = next(s for s in found["samples"]["edgeq_chat"] if s["doc"]["q"] == "Which is 3?")
    context = sample["arguments"][0][0]
    turns = context.split("<|im_start|>")
    assert turns[1] == "system\nBe short.<|im_end|>\n"
    assert turns[-2:] == [turns[-2], "assistant\n"]
    assert turns[-2].endswith("Which is 3?<|im_end|>\n")
    assert len(turns) == (6 if is_multiturn else 4)
