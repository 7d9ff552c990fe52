import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from edgeq.errors import RecipeError
from edgeq.stopping import ending
from edgeq.workdir import WorkDirectory, file_name, file_sha256, replacing, save_arrays
from tests.command_line import files_under


def writer(text):
    """A maker of an artefact that says what it was called with."""
    return lambda path: path.write_text(text, "utf-8")


def make(directory, text="content", inputs=None, name="part.txt"):
    """Ask for an artefact in a run of its own; return (its text, was it reused)."""
    with WorkDirectory(directory) as work:
        path = work.artefact(name, inputs or {"model": "a", "types": {"x": 1}}, writer(text))
        assert work.reused + work.made == [name]
        return path.read_text("utf-8"), bool(work.reused)


def test_an_artefact_is_made_once(tmp_path):
    assert make(tmp_path / "w") == ("content", False)
    assert make(tmp_path / "w", "other") == ("content", True)
    assert files_under(tmp_path / "w") == {"lock", "part.txt", "part.txt.made.json"}


def test_inputs_are_compared_as_json_not_by_order(tmp_path):
    make(tmp_path, inputs={"a": 1, "b": (1, 2)})
    assert make(tmp_path, inputs={"b": [1, 2], "a": 1})[1]


@pytest.mark.parametrize(
    "inputs", [{"model": "b", "types": {"x": 1}}, {"model": "a"}, {"model": "a", "types": {"x": 2}}]
)
def test_other_inputs_make_another_artefact(inputs, tmp_path):
    make(tmp_path)
    assert make(tmp_path, "other", inputs) == ("other", False)
    assert make(tmp_path, "third", inputs) == ("other", True)


@pytest.mark.parametrize("damaged", ["part.txt", "part.txt.made.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_artefact_is_made_again(damaged, damage, tmp_path):
    make(tmp_path)
    path = tmp_path / damaged
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "cut" else content[:-4] + b"!!!!")
    assert make(tmp_path, "new") == ("new", False)


def test_a_record_of_another_shape_is_not_believed(tmp_path):
    make(tmp_path)
    (tmp_path / "part.txt.made.json").write_text("[1, 2]", "utf-8")
    assert make(tmp_path, "new") == ("new", False)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_an_interrupted_artefact_is_not_there(interruption, tmp_path):
    def stop(path):
        path.write_text("half", "utf-8")
        raise interruption

    directory = tmp_path / "w"
    make(directory, name="first.txt")
    with pytest.raises(interruption), WorkDirectory(directory) as work:
        work.artefact("deep/part.txt", {}, stop)
    assert files_under(directory) == {"lock", "first.txt", "first.txt.made.json", "deep"}


@pytest.mark.parametrize("is_kept", [True, False])
def test_an_interrupted_run_says_what_is_reused(is_kept, tmp_path):
    def run():
        with WorkDirectory(tmp_path, is_kept=is_kept) as work:
            work.artefact("part.txt", {}, lambda path: path.write_text("x", "utf-8"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run()
    assert (str(tmp_path) in ending(caught.value)[1]) == is_kept


def test_a_new_directory_goes_again_if_nothing_was_made(tmp_path):
    for directory in (tmp_path / "new", tmp_path / "existing"):
        if directory.name == "existing":
            directory.mkdir()
        with pytest.raises(ValueError, match="no"), WorkDirectory(directory):
            raise ValueError("no")
    assert files_under(tmp_path) == {"existing", "existing/lock"}


def test_a_full_device_is_one_sentence_and_keeps_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_text("before", "utf-8")

    def fill(temporary):
        temporary.write_text("half", "utf-8")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    message = r"file: cannot be written \(No space left on device\)"
    with pytest.raises(RecipeError, match=message), replacing(path) as temporary:
        fill(temporary)
    assert path.read_text("utf-8") == "before"
    assert files_under(tmp_path) == {"file"}


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    below = tmp_path / "file" / "below"
    with pytest.raises(RecipeError, match="below: cannot be written"), replacing(below):
        pass


def test_what_a_killed_run_left_is_swept_away(tmp_path):
    make(tmp_path)
    (tmp_path / "layers").mkdir()
    for name in (".part.txt.999.tmp", "layers/.blk.0.999.tmp", "layers/.tmpAb3dE9"):
        (tmp_path / name).write_text("half", "utf-8")
    (tmp_path / ".tmp-of-somebody").write_text("not ours", "utf-8")
    make(tmp_path)
    left = {Path(name).name for name in files_under(tmp_path) if "tmp" in Path(name).name}
    assert left == {".tmp-of-somebody"}


def test_what_a_killed_run_left_beside_its_output_goes_with_the_next(tmp_path):
    out = tmp_path / "out[1].gguf"  # not a pattern
    code = (
        "import os, pathlib, signal, sys\n"
        "from converters.output import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(files_under(tmp_path)) == 1
    (tmp_path / ".other.gguf.1-00000000.tmp").touch()  # of another output
    with replacing(out) as temporary:
        with replacing(out) as second:  # the first is in use
            second.write_text("second", "utf-8")
        temporary.write_text("first", "utf-8")
        assert temporary.exists()
    assert out.read_text("utf-8") == "first"
    assert files_under(tmp_path) == {out.name, ".other.gguf.1-00000000.tmp"}


def test_one_process_at_a_time(tmp_path):
    directory = tmp_path / "w"
    code = (
        "import pathlib, sys\n"
        "from edgeq.errors import RecipeError\n"
        "from edgeq.workdir import WorkDirectory\n"
        "try:\n"
        "    with WorkDirectory(pathlib.Path(sys.argv[1])):\n"
        "        print('got it')\n"
        "except RecipeError as error:\n"
        "    print(error)\n"
    )
    other = [sys.executable, "-c", code, str(directory)]

    def ask():
        return subprocess.run(other, capture_output=True, text=True, check=True).stdout

    with WorkDirectory(directory):
        expected = f"{directory}: in use by process {os.getpid()}. Wait for it to end or give "
        assert ask() == expected + "another directory with --work.\n"
        with pytest.raises(RecipeError, match="in use by process"), WorkDirectory(directory):
            pass
        assert (directory / "lock").exists()
    assert ask() == "got it\n"


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RecipeError, match="cannot be used as work directory"):
            with WorkDirectory(path):
                pass


def test_arrays_are_stored_or_an_os_error_says_why(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3)}
    save_arrays(arrays, tmp_path / "a", {"about": "x"})
    np.testing.assert_array_equal(load_file(tmp_path / "a")["a"], arrays["a"])
    with pytest.raises(OSError, match="No such file"):
        save_arrays(arrays, tmp_path / "none" / "a")


@pytest.mark.parametrize("text", ["../../up", "/root", "a/b", "..", "a\\b", "ü %2F", "blk.0"])
def test_file_names_stay_in_their_directory_and_apart(text, tmp_path):
    name = file_name(text) + ".x"
    assert (tmp_path / name).parent == tmp_path
    assert os.path.basename(name) == name
    assert "\\" not in name
    assert file_name(text) != file_name(text + "/")
    assert file_name("a/b") != file_name("a%2Fb")


def test_the_hash_is_that_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")
