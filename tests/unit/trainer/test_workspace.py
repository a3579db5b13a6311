"""Writes on the shared volume: whole or not at all, also when they fail or the process is killed."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from finetune_trainer import workspace
from finetune_trainer.workspace import Workspace, new_folder, write_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_folders_have_the_documented_names(tmp_path):
    space = Workspace(tmp_path)
    folders = (space.model, space.data, space.checkpoints, space.artifacts, space.report)
    assert [str(folder.relative_to(tmp_path)) for folder in folders] == [
        "model",
        "data",
        "checkpoints",
        "artifacts",
        "report",
    ]


class TestWriteFile:
    def test_writes_text_and_bytes_and_makes_the_folder(self, tmp_path):
        write_file(tmp_path / "report" / "a.json", "größer")
        write_file(tmp_path / "report" / "b.bin", b"\xff\x00")
        assert (tmp_path / "report" / "a.json").read_text(encoding="utf-8") == "größer"
        assert (tmp_path / "report" / "b.bin").read_bytes() == b"\xff\x00"
        assert names(tmp_path / "report") == ["a.json", "b.bin"]

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path, monkeypatch, step):
        path = tmp_path / "evaluation.json"
        write_file(path, "old")
        if step == "fsync":
            monkeypatch.setattr(os, "fsync", full_disk)
        else:
            monkeypatch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_file(path, "new")
        assert path.read_text() == "old"
        assert names(tmp_path) == ["evaluation.json"]

    def test_what_a_kill_left_goes_with_the_next_write(self, tmp_path):
        (tmp_path / ".a.json.0123abcd").touch()
        (tmp_path / ".a.json.notes").touch()
        write_file(tmp_path / "a.json", "new")
        assert names(tmp_path) == [".a.json.notes", "a.json"]


class TestNewFolder:
    def fill(self, path: Path, text: str) -> None:
        with new_folder(path) as folder:
            (folder / "weights").write_text(text)
            (folder / "deep").mkdir()
            (folder / "deep" / "er").write_text(text)

    def test_is_seen_only_when_it_is_whole(self, tmp_path):
        path = tmp_path / "checkpoints" / "best"
        with new_folder(path) as folder:
            (folder / "weights").write_text("1")
            assert not path.exists()
        assert names(path) == ["weights"]
        assert names(path.parent) == ["best"]

    def test_replaces_an_older_folder_with_all_it_held(self, tmp_path):
        self.fill(tmp_path / "best", "old")
        (tmp_path / "best" / "gone").touch()
        self.fill(tmp_path / "best", "new")
        assert (tmp_path / "best" / "deep" / "er").read_text() == "new"
        assert names(tmp_path / "best") == ["deep", "weights"]
        assert names(tmp_path) == ["best"]

    def test_replaces_where_the_filesystem_cannot_swap_names(self, tmp_path, monkeypatch):
        monkeypatch.setattr(workspace, "_exchange", lambda _one, _other: False)
        self.fill(tmp_path / "best", "old")
        self.fill(tmp_path / "best", "new")
        assert (tmp_path / "best" / "weights").read_text() == "new"
        assert names(tmp_path) == ["best"]

    @pytest.mark.parametrize("failure", [ValueError("in the block"), KeyboardInterrupt()])
    def test_an_error_in_the_block_leaves_the_old_folder_and_nothing_else(self, tmp_path, failure):
        self.fill(tmp_path / "best", "old")
        with pytest.raises(type(failure)), new_folder(tmp_path / "best") as folder:
            (folder / "weights").write_text("half")
            raise failure
        assert (tmp_path / "best" / "weights").read_text() == "old"
        assert names(tmp_path) == ["best"]

    def test_a_full_disk_at_the_sync_leaves_the_old_folder(self, tmp_path, monkeypatch):
        self.fill(tmp_path / "best", "old")
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            self.fill(tmp_path / "best", "new")
        assert (tmp_path / "best" / "weights").read_text() == "old"
        assert names(tmp_path) == ["best"]

    def test_a_reader_never_finds_the_folder_missing_or_half(self, tmp_path):
        path = tmp_path / "best"
        self.fill(path, "0")
        seen: list[str] = []
        failures: list[OSError] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                try:
                    seen.append((path / "weights").read_text())
                except OSError as error:
                    failures.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(1, 31):
            self.fill(path, str(number))
        done.set()
        reader.join()
        assert failures == []
        assert set(seen) <= {str(number) for number in range(31)}
        assert len(set(seen)) > 1

    def test_a_killed_process_leaves_the_old_folder_and_the_next_write_its_rubbish(self, tmp_path):
        self.fill(tmp_path / "best", "old")
        (tmp_path / ".best.keep").mkdir()  # not ours
        code = (
            "import sys, pathlib, time\n"
            "from finetune_trainer.workspace import new_folder\n"
            "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
            "    (folder / 'weights').write_text('half')\n"
            "    print('writing', flush=True)\n"
            "    time.sleep(60)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "best")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert (tmp_path / "best" / "weights").read_text() == "old"
        assert len(names(tmp_path)) == 3
        self.fill(tmp_path / "best", "new")
        assert names(tmp_path) == [".best.keep", "best"]
        assert (tmp_path / "best" / "weights").read_text() == "new"
