"""Two thousand damaged files of every kind; ``scripts/fuzz`` reads more."""

import pytest

from tests import fuzzing

CASES = 2000
NAMES = (
    "gguf",
    "safetensors",
    "config.json",
    "tokenizer.json",
    "imatrix",
    "imatrix.dat",
    "plan.json",
    "costs.json",
    "policy",
    "report.json",
    "speeds.json",
)


@pytest.fixture(scope="module")
def surfaces(tmp_path_factory):
    return {one.name: one for one in fuzzing.surfaces(tmp_path_factory.mktemp("fuzz"))}


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files_give_nothing_but_our_own_errors(surfaces, name):
    surface = surfaces[name]
    good = surface.path.read_bytes()
    surface.read()
    try:
        found = [fuzzing.run(surface, good, seed) for seed in range(CASES)]
    finally:
        surface.path.write_bytes(good)
    assert [one for one in found if one is not None] == []


def test_every_surface_is_read(surfaces):
    assert sorted(surfaces) == sorted(NAMES)


def test_a_reader_that_fails_otherwise_is_found(tmp_path):
    path = tmp_path / "file"

    def read():
        raise KeyError("a bug")

    assert fuzzing.run(fuzzing.Surface("any", path, read), b"data", 0).what == "KeyError: 'a bug'"
