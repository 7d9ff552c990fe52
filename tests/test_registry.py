import sys
from importlib import metadata

import pytest

from converters.gguf_file import open_gguf
from edgeq.errors import RegistryError
from edgeq.quantizers import QUANTIZERS
from edgeq.registry import Plugin, Registry, unknown_name
from tests.command_line import done, refused

GROUP = "edgeq.quantizers"
BUILTINS = {"rtn": "edgeq.quantizers.rtn:RoundToNearest", "gone": "edgeq.nowhere:Gone"}
PLUGIN = """
import numpy as np
from edgeq.quantizers.rtn import RoundToNearest

class Zeros(RoundToNearest):
    def quantize(self, name, weight, qtype, inputs, *, n_threads=None):
        zeros = np.zeros_like(weight)
        return super().quantize(name, zeros, qtype, inputs, n_threads=n_threads)
"""


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Install a distribution with the entry points given, as pip would lay it out."""

    def install(entries, name="edgeq-zeros", version="1.2"):
        site = tmp_path / name
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8"
        )
        lines = "".join(f"{key} = {target}\n" for key, target in entries.items())
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}", "utf-8")
        (site / "edgeq_zeros.py").write_text(PLUGIN, "utf-8")
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(vars(QUANTIZERS), "plugins", raising=False)

    yield install
    vars(QUANTIZERS).pop("plugins", None)
    sys.modules.pop("edgeq_zeros", None)


def test_built_ins_are_listed_by_name_and_imported_on_demand():
    registry = Registry(GROUP, BUILTINS)
    assert registry.names() == ["gone", "rtn"]
    assert registry.plugins["rtn"] == Plugin("rtn", BUILTINS["rtn"], "edgeq")
    assert registry.get("rtn").__name__ == "RoundToNearest"


def test_an_entry_that_cannot_be_imported_names_its_distribution():
    message = r"quantizer 'gone' of edgeq: edgeq.nowhere:Gone cannot be imported \(No module"
    with pytest.raises(RegistryError, match=message):
        Registry(GROUP, BUILTINS).get("gone")
    registry = Registry(GROUP, {"half": "edgeq.quantizers.rtn:Missing"})
    with pytest.raises(RegistryError, match="has no attribute 'Missing'"):
        registry.get("half")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(RegistryError, match=r"unknown quantizer 'rtm'; known: gone, rtn\. Did you"):
        Registry(GROUP, BUILTINS).get("rtm")
    assert unknown_name("type", "xyz", ["Q4_0"]) == "unknown type 'xyz'; known: Q4_0."


def test_a_quantizer_of_another_distribution_takes_part(distribution, tiny, tmp_path):
    distribution({"zeros": "edgeq_zeros:Zeros"})
    assert metadata.version("edgeq-zeros") == "1.2"
    listed = done("plugins", "--json").json()["quantizer"]
    ours = {"name": "zeros", "target": "edgeq_zeros:Zeros", "origin": "edgeq-zeros"}
    assert ours in listed
    out = tmp_path / "out.gguf"
    flags = ("--type", "Q4_0", "--no-imatrix", "--no-prove", "--quantizer", "zeros")
    done("export", tiny, out, *flags)
    file = open_gguf(out)
    assert not file.read_float("blk.0.ffn_up.weight").any()
    inspected = done("inspect", out, "--json").json()["provenance"]
    assert inspected["edgeq.recipe"]["quantizer"] == "zeros"
    assert inspected["edgeq.versions"]["edgeq-zeros"] == "1.2"


def test_another_version_of_a_quantizer_quantizes_anew(distribution, tiny, tmp_path):
    flags = ("--type", "Q4_0", "--no-imatrix", "--no-prove", "--quantizer", "zeros", "--json")
    notes = []
    for version in ("1.2", "1.2", "1.3"):
        info = tmp_path / "edgeq-zeros"
        for old in info.glob("*.dist-info"):
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        distribution({"zeros": "edgeq_zeros:Zeros"}, version=version)
        notes.append(done("export", tiny, tmp_path / "o.gguf", *flags).json()["notes"])
    reused = [any(note.startswith("Reused") for note in each) for each in notes]
    assert reused == [False, True, False]


def test_two_distributions_with_one_name_are_refused(distribution, tiny, tmp_path):
    distribution({"rtn": "edgeq_zeros:Zeros"})
    message = "'rtn' is brought by both edgeq and edgeq-zeros. Uninstall one of them."
    assert message in refused("plugins")
    assert message in refused("export", tiny, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
