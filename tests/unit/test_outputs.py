"""A user's files are never deleted, a result is the old or the new one whenever a process dies, and one run writes at a time."""

import errno
import fcntl
import itertools
import json
import os
import signal
from pathlib import Path

import pytest

from llmtuner import outputs
from llmtuner.console import UserError
from llmtuner.files import MARKER
from llmtuner.outputs import (
    add_to_marker,
    atomic_directory,
    check_destination,
    finish_publishing,
    publish_files,
    read_marker,
    recover_directory,
)
from tests.scripts import in_fork, locked_by_another_process


def written(destination, text, **options):
    with atomic_directory(destination, "a test", **options) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "weights").write_text(text)
    return destination


def content(directory):
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


# ------------------------------------------------------------------------------------------------- what is never replaced
@pytest.mark.parametrize("replace", [False, True])
def test_directory_of_a_user_is_not_touched(tmp_path, replace):
    """A folder with a thesis and a model in it held only the merged model afterwards."""
    (tmp_path / "mine" / "other_model").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.tex").write_text("ten years")
    (tmp_path / "mine" / "other_model" / "config.json").write_text("{}")
    before = content(tmp_path / "mine")
    with pytest.raises(UserError, match=r"did not make \(other_model/config.json, thesis.tex\)"):
        written(tmp_path / "mine", "new", replace=replace)
    assert content(tmp_path / "mine") == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_file_that_was_put_into_a_result_keeps_it(tmp_path):
    result = written(tmp_path / "result", "old")
    (result / "sub" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt"):
        written(result, "new", replace=True)
    assert content(result) == {"sub/weights": "old", "sub/notes.txt": "mine"}
    (result / "sub" / "notes.txt").unlink()
    (result / "card.md").write_text("written by a later step")
    add_to_marker(result, "card.md")
    assert content(written(result, "new", replace=True)) == {"sub/weights": "new"}


def test_result_is_replaced_only_when_asked_to(tmp_path):
    result = written(tmp_path / "result", "old", made_from={"base": "0123"})
    assert read_marker(result) == {"made_by": "a test", "made_from": {"base": "0123"}, "files": ["sub/weights"]}
    with pytest.raises(UserError, match=r"result of a test already\. Set OVERWRITE=1"):
        written(result, "new")
    assert content(result) == {"sub/weights": "old"}
    (tmp_path / "empty").mkdir()
    assert content(written(tmp_path / "empty", "new")) == {"sub/weights": "new"}


@pytest.mark.parametrize(
    "place", [".", "..", "../..", "home", "repository", "around the repository", "/", "link to home"]
)
def test_places_that_are_never_replaced(tmp_path, monkeypatch, place):
    """Only looked at: nothing here comes near to deleting anything."""
    home, cwd = tmp_path / "home", tmp_path / "room" / "cwd"
    for directory in (home, cwd):
        directory.mkdir(parents=True)
    monkeypatch.setattr(Path, "home", lambda: home)
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(outputs, "REPO_ROOT", tmp_path / "code" / "repository")
    (tmp_path / "code" / "repository").mkdir(parents=True)
    (tmp_path / "link").symlink_to(home)
    named = {
        "home": home,
        "repository": tmp_path / "code" / "repository",
        "around the repository": tmp_path / "code",
        "link to home": tmp_path / "link",
    }
    with pytest.raises(UserError, match="is never replaced"):
        check_destination(named.get(place, Path(place)), replace=True)


def test_mount_point_and_file_are_refused(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    with pytest.raises(UserError, match="mount point"):
        check_destination(tmp_path / "disk", replace=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        check_destination(tmp_path / "file", replace=True)


def test_symbolic_link_to_a_larger_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "chat_model").symlink_to(tmp_path / "disk" / "chat_model")
    for text in ("old", "new"):
        written(tmp_path / "chat_model", text, replace=True)
        assert (tmp_path / "chat_model").is_symlink()
        assert content(tmp_path / "disk" / "chat_model") == {"sub/weights": text}
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="Choose another directory"):
        check_destination(tmp_path / "loop")


def test_export_leaves_a_full_directory_alone(tiny_run, tmp_path):
    """The door that users go through: exit 2, one message, nothing touched."""
    from llmtuner.train.tuner import export_model, run_exp

    run_exp({**tiny_run, "max_steps": 1})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years")
    export = dict(
        model_name_or_path=tiny_run["model_name_or_path"],
        adapter_name_or_path=tiny_run["output_dir"],
        export_dir=str(tmp_path / "mine"),
    )
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis\.tex"):
            export_model({**export, "overwrite_output_dir": overwrite})
    assert content(tmp_path / "mine") == {"thesis.tex": "ten years"}
    export["export_dir"] = str(tmp_path / "merged")
    export_model(export)
    with pytest.raises(UserError, match="OVERWRITE=1"):
        export_model(export)
    export_model({**export, "overwrite_output_dir": True})


# ------------------------------------------------------------------------------------------------- whole, whatever happens
def test_error_while_writing_leaves_the_old_one(tmp_path):
    result = written(tmp_path / "result", "old")

    def fail():
        with atomic_directory(result, replace=True) as partial:
            (partial / "half").touch()
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    assert content(result) == {"sub/weights": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_rename_that_fails_names_both_versions(tmp_path, monkeypatch):
    result, rename = written(tmp_path / "result", "old"), Path.rename

    def fail_for_new(path, target):
        if path.suffix == ".partial":
            raise OSError(13, "no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(UserError, match=r"new version is complete in .*partial, the old one in .*result\.$") as error:
        written(result, "new", replace=True)
    assert content(result) == {"sub/weights": "old"}
    new = next(path for path in tmp_path.iterdir() if path.suffix == ".partial")
    assert str(new) in str(error.value)
    assert content(new) == {"sub/weights": "new"}


def check_read_only_folder(room):
    """The old version cannot be deleted: both are there, and the message says where."""
    result = written(room / "result", "old")
    (result / "sub").chmod(0o500)
    written(result, "new", replace=True)
    assert content(result) == {"sub/weights": "new"}
    [old] = [path for path in room.iterdir() if path.suffix == ".trash"]
    assert content(old) == {"sub/weights": "old"}
    (old / "sub").chmod(0o700)
    written(result, "newest", replace=True)  # which also deletes what it could not before
    assert [path.name for path in room.iterdir()] == ["result"]


def test_read_only_folder_as_a_user_without_rights(tmp_path, capfd):
    written(tmp_path / "first", "imports all that another user may not read")
    room = tmp_path / "work"

    def as_nobody():
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        room.mkdir()
        check_read_only_folder(room)

    tmp_path.chmod(0o777)
    if os.geteuid() == 0:
        for place in [path for path in tmp_path.parents if path.name.startswith(("pytest-", "popen-"))]:
            place.chmod(place.stat().st_mode | 0o011)  # to be passed through
    assert in_fork(as_nobody) == 0, capfd.readouterr().err
    assert "note: an older version was not deleted" in capfd.readouterr().out


def replace_directory(room):
    written(room / "result", "new", replace=True)


def replace_files(room):
    staged = room / ".partial"
    staged.mkdir(exist_ok=True)
    for name in ("config", "weights"):
        (staged / name).write_text("new")
    publish_files(staged, ["older"])


def save_checkpoint(room):
    from llmtuner.train import checkpointing

    staged = room / checkpointing.TMP_DIR / "checkpoint-5"
    staged.mkdir(parents=True, exist_ok=True)
    (staged / "weights").write_text("new")
    checkpointing.commit_checkpoint(room, 5, limit=1)


CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")  # calls that change the disk


def killed_at(number, change, room):
    """Forks a process that kills itself at the n-th call with which `change` changes the disk; false if it has less."""

    def counted(function):
        def call(*args, **kwargs):
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    def change_and_die():
        for owner, name in itertools.product((os, Path), CHANGES):
            if hasattr(owner, name):
                setattr(owner, name, counted(getattr(owner, name)))
        change(room)

    left = itertools.count(number - 1, -1)
    code = in_fork(change_and_die)
    assert code in (0, -signal.SIGKILL)
    return code == -signal.SIGKILL


def kill_everywhere(tmp_path, change, prepare, check):
    """Kills a process at each of its changes to the disk, and looks at what a next one would find."""
    number = 0
    while True:
        number += 1
        room = tmp_path / str(number)
        room.mkdir()
        prepare(room)
        if not killed_at(number, change, room):
            return number - 1
        check(room)


@pytest.mark.slow
def test_kill_at_every_moment_of_a_replacement(tmp_path):
    def check(room):
        recover_directory(room / "result")
        assert content(room / "result") in ({"sub/weights": "old"}, {"sub/weights": "new"})
        assert content(written(room / "result", "newest", replace=True)) == {"sub/weights": "newest"}
        assert {path.name for path in room.iterdir()} <= {"result", ".result.lock"}

    assert kill_everywhere(tmp_path, replace_directory, lambda room: written(room / "result", "old"), check) > 10


@pytest.mark.slow
def test_kill_at_every_moment_while_an_adapter_takes_its_place(tmp_path):
    def prepare(room):
        for name in ("config", "weights", "older"):
            (room / name).write_text("old")

    def check(room):
        finish_publishing(room)
        assert {name: text for name, text in content(room).items() if not name.startswith(".")} in (
            {"config": "old", "weights": "old", "older": "old"},
            {"config": "new", "weights": "new"},
        )
        replace_files(room)
        assert content(room).keys() - {".partial"} >= {"config", "weights"}

    assert kill_everywhere(tmp_path, replace_files, prepare, check) > 5


@pytest.mark.slow
def test_kill_at_every_moment_while_a_checkpoint_is_saved(tmp_path):
    from llmtuner.train import checkpointing

    def checkpoint(room, step):
        (room / f"checkpoint-{step}").mkdir(parents=True)
        (room / f"checkpoint-{step}" / "weights").write_text("old")
        checkpointing.write_checksums(room / f"checkpoint-{step}")

    def prepare(room):
        checkpoint(room, 4)
        checkpoint(room, 5)  # saved again, as after a run that went on from 4

    def check(room):
        with checkpointing.lock_output_dir(room):
            newest = next(checkpointing.valid_checkpoints(room), None)
        assert newest is not None
        assert newest.name == "checkpoint-5"
        assert not list(room.glob("*.old"))

    assert kill_everywhere(tmp_path, save_checkpoint, prepare, check) > 8


def test_downloaded_adapter_cannot_move_or_delete_other_files(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    ready = tmp_path / "adapter" / outputs.READY
    ready.mkdir(parents=True)
    for manifest in (
        {"files": [], "obsolete": ["../thesis.tex"]},
        {"files": [str(tmp_path / "thesis.tex")], "obsolete": []},
    ):
        (ready / outputs.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError, match="names files outside"):
            finish_publishing(tmp_path / "adapter")
    assert (tmp_path / "thesis.tex").read_text() == "ten years"


# ------------------------------------------------------------------------------------------------------- one at a time
def test_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    assert content(written(tmp_path / "result", "new")) == {"sub/weights": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


def test_two_writers_never_mix(tmp_path):
    with (
        locked_by_another_process(tmp_path / ".result.lock") as holder,
        pytest.raises(UserError, match=f"in use by process {holder}"),
    ):
        written(tmp_path / "result", "new")
    assert content(written(tmp_path / "result", "new")) == {"sub/weights": "new"}
