"""The page and the model card: every figure is there, all text is text, bad reports are refused."""

import base64
import copy
import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import numpy as np
import pytest

from edgeq import benchmarks, pipeline
from edgeq.reporting import reading
from edgeq.reporting.markup import element, number, printable
from edgeq.reporting.plots import linear_axis, log_axis, log_ticks, nice_ticks
from edgeq.reporting.reading import read_reports
from edgeq.reporting.reproducing import command
from edgeq.reporting.style import TEXT, THEMES
from edgeq.reporting.tensor_map import ink, luminance, tone
from tests import tiny_gguf
from tests.command_line import done, files_under, refused, run

SHORT = ("--ctx", 64, "--chunks", 6, "--eval-chunks", 4)
ROUND = ("--quantizer", "gptq", "--transform", "none", "--fisher", 0)
EVIL = "<script>alert(1)</script> & \"'|`\x00\ud800"
TASK = {"context": "The river", "endings": [" is long.", " is a house."], "label": 0}
CONFIDENCE = (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99)
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
TEXT_CONTRAST, GRAPHIC_CONTRAST = 4.5, 3.0  # WCAG 2.2, 1.4.3 and 1.4.11


@pytest.fixture(scope="module")
def made(tiny, texts, tmp_path_factory):
    """Reports of an export with a baseline, of one with experts, of two files; and a bench."""
    place = tmp_path_factory.mktemp("report")
    out = place / "out.gguf"
    given = ("--text", texts[0], *SHORT)
    done("export", tiny, out, "--type", "Q4_0", *ROUND, "--baseline", *given)
    model = tiny_gguf.write(place / "moe.gguf", "qwen3moe")
    done("export", model, place / "moe-q4.gguf", "--type", "Q4_0", "--quantizer", "rtn", *given)
    other = place / "other.gguf"
    done("export", tiny, other, "--type", "Q8_0", "--no-imatrix", "--no-prove")
    task = place / "rivers.jsonl"
    task.write_text((json.dumps(TASK) + "\n") * 3, "utf-8")
    judged = ("--reference", tiny, "--text", texts[1], "--tasks", task, "--work", place / "work")
    measured = done("evaluate", out, other, *judged, "--ctx", 64, "--chunks", 5, "--json").out
    bench = done("bench", tiny, "--prompt", 8, "--gen", 4, "--repetitions", 2, "--json").out
    paths = {
        "export": place / "out.edgeq" / "report.json",
        "moe": place / "moe-q4.edgeq" / "report.json",
        "evaluate": place / "measured.json",
        "bench": place / "bench.json",
    }
    paths["evaluate"].write_text(measured, "utf-8")
    paths["bench"].write_text(bench, "utf-8")
    return paths


@pytest.fixture
def page(tmp_path):
    """Make a page of reports and parse it, strictly, as XML."""

    def make(*reports):
        out = tmp_path / "report.html"
        done("report", *reports, "-o", out)
        return ElementTree.fromstring(out.read_bytes())

    return make


@pytest.fixture
def edited(made, tmp_path):
    """Write the report of an export with a change."""

    def write(change, kind="export"):
        content = json.loads(made[kind].read_bytes())
        change(content)
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(content), "utf-8")
        return path

    return write


def content_of(path):
    return json.loads(path.read_bytes())


def said(node):
    return "".join(node.itertext())


def figure(page, title):
    (found,) = [each for each in page.iter("figure") if each.findtext("h3") == title]
    return found


def marks(node):
    return [each for each in node.iter() if "mark" in (each.get("class") or "").split()]


def rows(node):
    return [[said(cell) for cell in row] for row in node.findall("tbody/tr")]


def titled(node, caption):
    (found,) = [each for each in node.iter("table") if each.findtext("caption") == caption]
    return found


# --------------------------------------------------------------------------------- what is on it


def test_the_headline_has_every_file_beside_the_baseline(made, page):
    shown = page(made["export"])
    found = rows(titled(shown, "Measured through llama.cpp"))
    files = content_of(made["export"])["files"]
    assert [row[0] for row in found] == [
        "edgeq gptq Q4_0",
        "llama-quantize Q4_0",
        "float reference",
    ]
    for row, file in zip(found, files, strict=True):
        assert row[1:3] == [f"{file['size_bytes']:,}", f"{file['bpw']:.3f}"]
        assert row[7] == f"{file['speed']['decode']['median']:.1f} t/s"
    kld = files[0]["evaluation"]["summary"]["kld"]
    assert found[0][3] == f"{kld['value']:.5f} ± {kld['error']:.5f}"
    assert found[2][3:6] == ["–", "–", "–"]
    ratio = kld["value"] / files[1]["evaluation"]["summary"]["kld"]["value"]
    assert f"×{ratio:.3f} of the divergence of llama-quantize Q4_0" in said(shown)
    assert content_of(made["export"])["comparisons"][0] in said(shown)


def test_every_figure_has_as_many_marks_as_data(made, page):
    shown = page(made["export"])
    judged = reading.read_reports([made["export"]])[0][0].files[:2]
    assert len(marks(figure(shown, "Size against divergence"))) == 2
    n_bins = [
        len(set(np.digitize(np.exp(-f.evaluation.nll_reference), CONFIDENCE).ravel()))
        for f in judged
    ]
    assert len(marks(figure(shown, "By confidence"))) == sum(n_bins)
    assert len(marks(figure(shown, "By position"))) == 2 * 16
    n_percentiles = sum(p <= 50 or (1 - p / 100) * 124 >= 1 for p in PERCENTILES)
    assert len(marks(figure(shown, "Percentiles"))) == 2 * n_percentiles
    for title in ("Decode", "Prefill"):
        assert len(marks(figure(shown, title))) == 3
    for title in ("By confidence", "By position", "Percentiles"):
        lines = [each for each in figure(shown, title).iter("polyline")]
        assert len(lines) == 2
        data = figure(shown, title).find(".//table")
        assert sum(cell != "–" for row in rows(data) for cell in row[1:]) == len(
            marks(figure(shown, title))
        )


def test_bins_hold_every_token_once(made, page):
    shown = page(made["export"])
    found = reading.read_reports([made["export"]])[0][0].output.evaluation
    for title in ("By confidence", "By position"):
        own = [m for m in marks(figure(shown, title)) if said(m).startswith("edgeq gptq")]
        told = [re.search(r": (\S+) ± .* nats, (\d+) tokens", said(mark)) for mark in own]
        assert sum(int(each[2]) for each in told) == found.kld.size
        total = sum(float(each[1]) * int(each[2]) for each in told)
        assert total / found.kld.size == pytest.approx(found.kld.mean(), rel=5e-3)


def test_the_map_has_a_cell_with_its_reason_for_every_matrix(made, page):
    shown = page(made["export"])
    content = content_of(made["export"])
    cells = {
        each.get("aria-label").split(":")[0]: each
        for each in shown.iter("span")
        if each.get("class") == "cell"
    }
    matrices = {k: v for k, v in content["tensors"].items() if len(v["shape"]) > 1}
    assert set(cells) == set(matrices)
    for name, tensor in matrices.items():
        cell = cells[name]
        assert said(cell) == tensor["type"]
        assert f"why: {tensor['reason']}" in cell.get("aria-label")
        assert cell.get("tabindex") == "0"
    losses = {k: v["loss"] for k, v in content["rounding"]["tensors"].items() if "loss" in v}
    assert losses
    tones = {name: re.search(r"--loss:(#\w+)", cells[name].get("style"))[1] for name in losses}
    assert len(set(tones.values())) > 3
    worst, best = max(losses, key=losses.get), min(losses, key=losses.get)
    assert luminance(tones[worst]) < luminance(tones[best])
    buttons = [each for each in shown.iter("input")]
    assert [(b.get("type"), b.get("checked")) for b in buttons] == [
        ("radio", "checked"),
        ("radio", None),
    ]
    listed = {row[0]: row for row in rows(titled(shown, "Every tensor, its type and why"))}
    assert set(listed) == set(content["tensors"])
    for name, tensor in content["tensors"].items():
        assert listed[name][1] == tensor["type"]
        assert listed[name][5].startswith(tensor["reason"])
    assert listed["output.weight"][5].endswith("; rtn: no second moments of its inputs")
    sizes = rows(titled(shown, "Types"))
    assert sum(int(row[2]) for row in sizes) == len(content["tensors"])


def test_without_losses_there_is_nothing_to_switch(made, page):
    shown = page(made["moe"])
    assert list(shown.iter("input")) == []
    assert any(each.get("class") == "cell" for each in shown.iter("span"))


def test_experts_show_what_calibration_reached(made, edited, page):
    shown = figure(page(made["moe"]), "8 experts")
    counts = content_of(made["moe"])["experts"]
    assert {name.split(".")[2] for name in counts} == {
        "ffn_gate_exps",
        "ffn_up_exps",
        "ffn_down_exps",
    }
    assert len(marks(shown)) == 2 * 8
    (table,) = shown.iter("table")
    for row in rows(table):
        own = counts[f"{row[0]}.ffn_up_exps.weight"]
        assert row[1:] == [
            f"{min(own):,}",
            f"{sorted(own)[4]:,}",
            f"{max(own):,}",
            str(own.count(0)),
        ]

    def starve(content):
        for counts in content["experts"].values():
            counts[3] = 0

    shown = figure(page(edited(starve, "moe")), "8 experts")
    red = [m for m in marks(shown) if m.get("fill") == "#c62828"]
    assert [said(m).split(":")[0] for m in red] == ["blk.0, expert 3", "blk.1, expert 3"]


def test_tasks_and_speeds_of_a_bench_are_shown(made, page):
    shown = page(made["evaluate"], made["bench"])
    (table,) = [t for t in shown.iter("table") if t.findtext("caption").startswith("Answers")]
    found = rows(table)
    assert [row[0] for row in found] == ["rivers.jsonl, out.gguf", "rivers.jsonl, other.gguf"]
    for row, task in zip(found, content_of(made["evaluate"])["tasks"], strict=True):
        assert row[1] == "3"
        assert row[2].startswith(f"{100 * task['accuracy']['value']:.2f} % (")
        changed = task["comparison"]
        assert row[4] == f"{changed['to_wrong']} / {changed['to_right']}"
    runs = content_of(made["bench"])["runs"]
    for title in ("Decode, tiny.gguf", "Prefill, tiny.gguf"):
        bars = marks(figure(shown, title))
        assert [said(bar).split(":")[0] for bar in bars] == [
            f"{run['backend']}, 1 thread" for run in runs
        ]


def test_ours_and_others_have_other_marks(made, page):
    shapes = [
        m.get("class") for m in marks(figure(page(made["export"]), "Size against divergence"))
    ]
    assert sorted(shapes) == ["mark s0", "mark s1"]
    shown = figure(page(made["evaluate"]), "Size against divergence")  # both made by edgeq
    assert {m.get("class") for m in marks(shown)} == {"mark s0"}


def test_files_of_other_texts_are_not_compared(made, page):
    shown = page(made["export"], made["evaluate"])
    plots = [f for f in shown.iter("figure") if f.findtext("h3") == "Size against divergence"]
    assert [len(marks(plot)) for plot in plots] == [2, 2]
    assert "judged on different texts" in said(shown)
    labels = [row[0] for row in rows(titled(shown, "Measured through llama.cpp"))]
    assert len(set(labels)) == len(labels) == 5


def test_one_report_twice_has_labels_apart_and_one_reference(made, page):
    shown = page(made["export"], made["export"])
    labels = [row[0] for row in rows(titled(shown, "Measured through llama.cpp"))]
    assert len(set(labels)) == 5
    assert sum("float reference" in label for label in labels) == 1
    assert labels[0].startswith("edgeq gptq Q4_0 (out.gguf)")
    buttons = list(shown.iter("input"))
    assert len({button.get("id") for button in buttons}) == len(buttons) == 4
    assert len({button.get("name") for button in buttons}) == 2


def test_provenance_tells_hashes_and_versions(made, page):
    text = said(page(made["export"]))
    about = content_of(made["export"])["provenance"]
    for part in (about["source"]["sha256"], *(t["sha256"] for t in about["texts"].values())):
        assert part in text
    assert f"numpy {about['versions']['numpy']}" in text


@pytest.mark.parametrize("kind", ["export", "moe"])
def test_the_command_has_the_recipe_again(made, tiny, kind, monkeypatch, tmp_path):
    (report,), _ = read_reports([made[kind]])
    words = shlex.split(command(report))
    assert words[:2] == ["edgeq", "export"]
    recipes = []

    def spy(recipe, steps):
        recipes.append(recipe)
        return mock.Mock(**{"as_json.return_value": {}, "as_text.return_value": ""})

    monkeypatch.setattr(pipeline, "export", spy)
    monkeypatch.chdir(tmp_path)
    done(*words[1:])
    assert json.loads(json.dumps(recipes[0].as_json())) == report.told("recipe")
    assert recipes[0].baseline is (kind == "export")


def test_a_recipe_of_targets_is_a_command_too(edited):
    def change(content):
        recipe = content["provenance"]["recipe"]
        recipe["target"] |= {"size_bytes": 123456, "min_tps": 2.5}
        recipe |= {"sequential": False, "use_imatrix": False, "model": "it's here"}

    (report,), _ = read_reports([edited(change)])
    line = command(report)
    assert "--size 123456 --min-tps 2.5 --no-sequential --no-imatrix" in line
    assert "--type" not in line
    assert line.startswith("""edgeq export 'it'"'"'s here' out.gguf""")


def test_an_unproven_export_has_a_page(tiny, page, tmp_path):
    out = tmp_path / "plain.gguf"
    done("export", tiny, out, "--type", "Q8_0", "--no-imatrix", "--no-prove")
    shown = page(tmp_path / "plain.edgeq" / "report.json")
    assert "It was not measured against its reference." in said(shown)
    assert list(shown.iter("figure")) == []
    assert sum(each.get("class") == "cell" for each in shown.iter("span")) == 16


# ------------------------------------------------------------------------------ text stays text


def poisoned(content):
    """Put markup wherever a report holds text."""

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(each) for key, each in value.items()}
        if isinstance(value, list):
            return [poison(each) for each in value]
        return EVIL + value if isinstance(value, str) else value

    kept = [copy.deepcopy(file.get("evaluation")) for file in content["files"]]
    for key in ("files", "tasks", "notes", "comparisons", "provenance"):
        if key in content:
            content[key] = poison(content[key])
    for file, evaluation in zip(content["files"], kept, strict=True):
        file["evaluation"] = evaluation
        if evaluation is not None:
            evaluation |= {"model": EVIL, "reference": EVIL, "tokens_sha256": EVIL}
    for key in ("tensors", "experts", "seconds"):
        content[key] = {EVIL + k: v for k, v in content.get(key, {}).items()}
    for tensor in content["tensors"].values():
        tensor |= {"type": EVIL, "reason": EVIL}


@pytest.mark.parametrize("kind", ["export", "moe", "evaluate"])
def test_markup_in_a_report_is_shown_not_run(kind, edited, page):
    shown = page(edited(poisoned, kind))
    assert list(shown.iter("script")) == []
    assert "<script>alert(1)</script> & \"'|`��" in said(shown)
    known = {each.tag for each in page(edited(lambda content: None, kind)).iter()}
    assert {each.tag for each in shown.iter()} <= known
    for each in shown.iter():
        assert not any(name.startswith("on") for name in each.attrib)


def test_the_page_loads_nothing(made, tmp_path):
    out = tmp_path / "report.html"
    done("report", made["export"], made["moe"], made["evaluate"], made["bench"], "-o", out)
    text = out.read_text("utf-8")
    seen = []

    class Collector(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, dict(attributes)))

    Collector().feed(text)
    assert {"script", "link", "img", "iframe", "object", "image", "use", "a"}.isdisjoint(
        tag for tag, _ in seen
    )
    for _, attributes in seen:
        assert {"src", "href", "xlink:href", "srcset", "action"}.isdisjoint(attributes)
        assert "http" not in attributes.get("style", "")
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    assert 'content="default-src &#39;none&#39;; style-src &#39;unsafe-inline&#39;"' in text


def test_elements_escape_and_are_well_formed():
    found = element("p", 'a<b>&"', element("br"), None, class_="x", aria_label='"<', id=None)
    assert str(found) == '<p class="x" aria-label="&#34;&lt;">a&lt;b&gt;&amp;&#34;<br/></p>'
    assert printable("a\x00\x1b\ufffe\ud800\tß😀") == "a����\tß😀"


# ----------------------------------------------------------------------------------- accessibility


def test_the_page_can_be_read_without_seeing_it(made, page):
    shown = page(made["export"], made["moe"], made["evaluate"], made["bench"])
    assert shown.get("lang") == "en"
    assert shown.find("head/title") is not None
    assert len(list(shown.iter("h1"))) == 1
    headings = [int(each.tag[1]) for each in shown.iter() if re.fullmatch("h[1-6]", each.tag)]
    assert all(b <= a + 1 for a, b in itertools.pairwise(headings))
    for table in shown.iter("table"):
        assert table.find("caption") is not None
        assert all(cell.get("scope") for cell in table.iter("th"))
    for svg in shown.iter("svg"):
        assert svg.get("aria-hidden") == "true" or (
            svg.get("role") == "img" and svg.get("aria-label")
        )
    for each in shown.iter("figure"):
        assert each.find("figcaption") is not None
    labelled = {each.get("for") for each in shown.iter("label")}
    assert {each.get("id") for each in shown.iter("input")} == labelled
    ids = [each.get("id") for each in shown.iter() if each.get("id")]
    assert len(ids) == len(set(ids))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
def test_contrast_is_enough(theme):
    colours = THEMES[theme]
    for ground in ("paper", "panel"):
        for name in TEXT:
            assert contrast(colours[name], colours[ground]) >= TEXT_CONTRAST, (name, ground)
        for i in range(6):
            assert contrast(colours[f"s{i}"], colours[ground]) >= GRAPHIC_CONTRAST, (i, ground)
    for k in range(101):
        assert contrast(tone(k / 100), ink(tone(k / 100))) >= TEXT_CONTRAST
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


# -------------------------------------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.013, 0.021, [0.014, 0.016, 0.018, 0.02]),
        (-3, 7, [-2, 0, 2, 4, 6]),
        (80e6, 120e6, [80e6, 90e6, 100e6, 110e6, 120e6]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert nice_ticks(low, high) == pytest.approx(expected)


def test_logarithmic_ticks_are_few_and_round():
    assert log_ticks(1e-4, 1) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1])
    assert log_ticks(0.03, 0.2) == pytest.approx([0.05, 0.1, 0.2])
    for span in (1.5, 7, 100, 1e6):
        assert 2 <= len(log_ticks(0.0123, 0.0123 * span)) <= 9


@pytest.mark.parametrize("values", [[], [0.0], [5.0], [5.0, 5.0], [-1.0, 2.0], [1e-9, 3e-9]])
@pytest.mark.parametrize("make", [linear_axis, log_axis])
def test_axes_hold_any_values(values, make):
    axis = make("x", values)
    assert axis.low < axis.high
    assert len(axis.ticks) >= 2
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)
    for value in values:
        assert 0 <= axis.share(value) <= 1


def test_numbers_are_for_people():
    shown = [number(v) for v in (0, 0.0123456, 12345.6, 1.2e-7, 1e-6, -0.5)]
    assert shown == ["0", "0.0123", "12,346", "1.2·10⁻⁷", "10⁻⁶", "-0.5"]


# ------------------------------------------------------------------------------------ model card


def front_matter(text):
    yaml = pytest.importorskip("yaml")
    start, head, body = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head), body


def test_a_card_has_metadata_table_and_how_to_run_it(made, tmp_path):
    shown = done("report", made["export"], "--markdown").out
    head, body = front_matter(shown)
    assert head == {
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "tags": ["gguf", "quantized", "edgeq", "llama-cpp", "llama"],
    }
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert table[2].startswith("| edgeq gptq Q4_0 ")
    assert "llama-cli -m out.gguf" in body
    assert "FROM ./out.gguf" in body
    assert "edgeq export tiny.gguf out.gguf --type Q4_0 --quantizer gptq" in body
    assert str(tmp_path.parents[0]) not in body
    assert content_of(made["export"])["provenance"]["source"]["sha256"] in body
    out = tmp_path / "README.md"
    told = done("report", made["export"], "--markdown", "-o", out, "--json").json()
    assert out.read_text("utf-8") == shown
    assert len(told["notes"]) == 2
    assert done("report", made["export"], "--markdown", "--json").json() == {"markdown": shown}


def test_a_card_knows_where_the_model_is_from(edited):
    def change(content):
        content["provenance"]["model"] |= {
            "name": "Small: one # two",
            "license": "Apache-2.0",
            "repo_url": "https://huggingface.co/maker/small-1",
        }

    head, body = front_matter(done("report", edited(change), "--markdown").out)
    assert head["base_model"] == "maker/small-1"
    assert head["base_model_relation"] == "quantized"
    assert head["license"] == "apache-2.0"
    assert "# Small: one \\# two, GGUF" in body


def test_a_model_tells_its_name_and_license(texts, tmp_path):
    field = tiny_gguf.Field
    told = {
        "general.name": field("Tiny", tiny_gguf.TEXT),
        "general.license": field("mit", tiny_gguf.TEXT),
        "general.repo_url": field("https://huggingface.co/a/tiny", tiny_gguf.TEXT),
    }
    model = tiny_gguf.write(tmp_path / "model.gguf", "llama", extra=told)
    done("export", model, tmp_path / "o.gguf", "--type", "Q8_0", "--no-imatrix", "--no-prove")
    report = tmp_path / "o.edgeq" / "report.json"
    head, body = front_matter(done("report", report, "--markdown").out)
    assert (head["base_model"], head["license"]) == ("a/tiny", "mit")
    assert body.startswith("\n# Tiny, GGUF")


@pytest.mark.parametrize("kind", ["export", "moe", "evaluate"])
def test_a_card_of_odd_names_is_still_markdown(kind, edited):
    def change(content):
        poisoned(content)
        for file in content["files"]:
            file["label"] += "\n---\n# no heading"
            file["path"] = "a```\nb.gguf"

    shown = done("report", edited(change, kind), "--markdown").out
    head, body = front_matter(shown)
    assert head["library_name"] == "gguf"
    assert "\n# no heading" not in body
    outside = re.sub(r"(?ms)^(`{3,})\w*\n.*?^\1$|`[^`\n]*`", "", body)
    assert "<script>" not in outside
    widths = {len(re.findall(r"(?<!\\)\|", row)) for row in outside.splitlines() if row[:1] == "|"}
    assert widths == {9}


# -------------------------------------------------------------------------------------- bad input


def saved(value):
    return base64.b64encode(zlib.compress(np.full((4, 31), value).tobytes())).decode()


NAN, HUGE = saved(math.nan), saved(1e300)


def first(content):
    return content["files"][0]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c.update(schema=99), "got a report of schema 99, expected 1"),
        (lambda c: c.pop("schema"), "got a report of schema None, expected 1"),
        (lambda c: c.pop("files"), "is not a report; expected what edgeq export, evaluate --json"),
        (lambda c: c.update(files=[]), "is not a whole report (no file in it)"),
        (lambda c: c.update(files=[3]), "is not a whole report"),
        (lambda c: first(c).pop("label"), "is not a whole report ('label')"),
        (lambda c: first(c).update(bpw="many"), "got 'many', expected a number"),
        (lambda c: first(c).update(bpw=math.nan), "got nan, expected a number"),
        (lambda c: first(c).update(size_bytes=-1), "got -1, expected a whole number from 0"),
        (lambda c: first(c).update(size_bytes=10**400), "is not a whole report"),
        (lambda c: first(c).update(evaluation=3), "is not a whole report"),
        (lambda c: first(c)["evaluation"]["tokens"].update(nll=HUGE), "is not a whole report"),
        (lambda c: first(c)["evaluation"].update(n_chunks=0), "is not a whole report"),
        (lambda c: first(c)["speed"]["decode"].update(low=-1), "got speeds from -1.0 to"),
        (lambda c: first(c)["evaluation"].pop("tokens"), "not a complete saved evaluation"),
        (lambda c: first(c)["evaluation"]["tokens"].update(kld=NAN), "NaN or infinite values"),
        (lambda c: first(c).update(speed={"prefill": 3}), "is not a whole report"),
        (lambda c: c.update(tensors=[1]), "got [1], expected an object"),
        (lambda c: c.update(tensors={"a": {}}), "is not a whole report ('shape')"),
        (lambda c: c["tensors"]["output.weight"].update(shape=[0]), "output.weight: shape [0]"),
        (lambda c: c.update(experts={"a": ["x"]}), "got 'x', expected a number"),
        (lambda c: c.update(provenance=[]), "got [], expected an object"),
        (lambda c: c.update(tasks=[{}]), "is not a whole report ('task')"),
        (lambda c: c.update(seconds={"a": None}), "got None, expected a number"),
    ],
)
def test_a_report_that_is_none_is_refused(change, expected, edited, tmp_path):
    report = edited(change)
    old = tmp_path / "report.html"
    old.write_text("as it was", "utf-8")
    before = files_under(tmp_path)
    for arguments in (("-o", old), ("--markdown",)):
        line = refused("report", report, *arguments)
        assert line.startswith(f"edgeq: {report}: ")
        assert expected in line
    assert files_under(tmp_path) == before
    assert old.read_text("utf-8") == "as it was"


def test_files_that_are_no_reports_are_refused(made, tiny, tmp_path):
    out = tmp_path / "report.html"
    for path, expected in (
        (tmp_path / "missing.json", "cannot be read: No such file"),
        (tiny, "is not JSON"),
        (made["bench"], "holds speeds alone"),
        (made["export"].parent / "plan.json", "is not a report"),
    ):
        assert f"edgeq: {path}: {expected}" in refused("report", path, "-o", out)
    (tmp_path / "list.json").write_text("[]", "utf-8")
    assert "is not a report" in refused("report", tmp_path / "list.json", "-o", out)
    (tmp_path / "deep.json").write_text("[" * 100_000, "utf-8")
    assert "is not JSON" in refused("report", tmp_path / "deep.json", "-o", out)
    line = refused("report", made["export"], tmp_path / "missing.json", "-o", out)
    assert "missing.json: cannot be read" in line
    assert not out.exists()


def test_a_bench_of_another_schema_is_refused(made, edited, tmp_path):
    assert reading.BENCH_SCHEMA == benchmarks.SCHEMA
    out = ("-o", tmp_path / "report.html")
    bench = edited(lambda content: content.update(schema=2), "bench")
    assert "got a report of schema 2, expected 1" in refused("report", made["export"], bench, *out)
    bench = edited(lambda content: content["runs"][0].pop("decode"), "bench")
    assert "is not a whole report ('decode')" in refused("report", made["export"], bench, *out)


def test_places_that_cannot_be_written_are_refused(made, tmp_path):
    report = Path(shutil.copy(made["export"], tmp_path / "report.json"))
    content = report.read_bytes()
    for more in ((), ("--markdown",)):
        assert "is read. Give another name" in refused("report", report, "-o", report, *more)
        line = refused("report", report, "-o", tmp_path / "none" / "x.html", *more)
        assert "there is no directory" in line
        line = refused("report", report, "-o", tmp_path, *more)
        assert "cannot be written" in line
    assert report.read_bytes() == content
    assert files_under(tmp_path) == {"report.json"}


def test_wrong_usage_is_told(made):
    assert "Missing option '-o'" in usage("report", made["export"])
    assert "a card is of one report" in usage("report", made["export"], made["moe"], "--markdown")


def usage(*arguments):
    result = run(*arguments)
    assert (result.code, result.out) == (2, "")
    return result.err


# ---------------------------------------------------------------------------------- a real browser

CHROMIUM = shutil.which("chromium")
PROBE = """<script>
addEventListener("load", () => {
  const inside = (a, b) => a.left >= b.left - 40 && a.right <= b.right + 40 &&
    a.top >= b.top - 2 && a.bottom <= b.bottom + 2;
  const plots = [...document.querySelectorAll("figure > svg")].map(svg => {
    const frame = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll(".mark")].map(m => m.getBoundingClientRect());
    return {label: svg.ariaLabel, width: frame.width, height: frame.height, marks: boxes.length,
      drawn: boxes.filter(b => b.width > 0 && b.height > 0 && inside(b, frame)).length};
  });
  const cell = document.querySelector(".cell");
  cell.focus();
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify({plots, overflow: document.documentElement.scrollWidth -
    innerWidth, width: innerWidth, paper: getComputedStyle(document.body).backgroundColor,
    focused: document.activeElement === cell,
    tip: getComputedStyle(cell, "::after").content});
  document.body.append(out);
});
</script>"""


def chromium(page, directory, *flags):
    """Open a page; return its DOM and what the console said."""
    arguments = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    arguments += [f"--user-data-dir={directory}", *flags, "--dump-dom", page.as_uri()]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium found")
@pytest.mark.parametrize("size", ["1280,900", "500,844"])
def test_a_browser_draws_every_plot(made, size, tmp_path):
    out = tmp_path / "report.html"
    done("report", made["export"], made["moe"], made["evaluate"], made["bench"], "-o", out)
    dom, console = chromium(out, tmp_path / "profile", f"--window-size={size}")
    assert console == []  # the page's policy makes every request, and every script, an error
    shown = ElementTree.fromstring(out.read_bytes())
    assert dom.count("<svg") == len(list(shown.iter("svg")))
    text = out.read_text("utf-8")
    probed = re.sub("<meta http-equiv[^>]*>", "", text).replace("</body>", PROBE + "</body>")
    out.write_text(probed, "utf-8")
    dom, console = chromium(out, tmp_path / "profile", f"--window-size={size}")
    assert console == []
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)[1])
    assert found["overflow"] <= 0
    assert found["focused"]
    assert "bits a weight" in found["tip"] or "attr(aria-label)" in found["tip"]
    plots = [svg for each in shown.iter("figure") for svg in each.findall("svg")]
    assert [plot["label"] for plot in found["plots"]] == [svg.get("aria-label") for svg in plots]
    for plot, svg in zip(found["plots"], plots, strict=True):
        assert min(plot["width"], plot["height"]) > 30, plot
        assert plot["marks"] == plot["drawn"] == len(marks(svg)) > 0, plot
