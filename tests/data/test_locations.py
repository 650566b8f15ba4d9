import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from influencespace.data.exports import export
from influencespace.data.locations import LOCK, alone_in, local_folder
from influencespace.errors import InputError

URLS = ["s3://bucket/x", "gs://bucket", "memory://x", "file:///tmp/x", "http://host/x", "s3://"]


@pytest.mark.parametrize("url", [*URLS, *map(Path, URLS)])  # pathlib makes `s3:/bucket` of `s3://bucket`
def test_a_url_is_refused_and_no_folder_made_of_it(
    url: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--out s3:|--out gs:|--out memory:|--out file:|--out http:"):
        local_folder(url, "--out")
    with pytest.raises(InputError, match="give a local or mounted folder"):
        export(tmp_path, "npy", url)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["out", "/tmp/out", "a:b/c", "../out", "C:/out", "~/out", "."])
def test_paths_are_folders(path: str) -> None:
    assert local_folder(path, "--out") == local_folder(Path(path), "--out") == Path(path)


def test_a_folder_is_held_against_other_processes_and_is_free_again(tmp_path: Path) -> None:
    def enter(folder: Path) -> str:
        lines = (
            "from pathlib import Path",
            "from influencespace.data.locations import alone_in",
            f"with alone_in(Path({str(folder)!r})): pass",
        )
        command = [sys.executable, "-c", "\n".join(lines)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr

    out = tmp_path / "deep" / "run"
    with alone_in(out), alone_in(out):  # the process itself may enter again
        assert f"another command is working in {out}" in enter(out)
    assert enter(out) == ""


def test_a_folder_is_free_again_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), alone_in(tmp_path):
        raise KeyboardInterrupt
    with FileLock(tmp_path / LOCK, timeout=0):
        pass


def test_a_file_is_no_folder_to_write_into(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"cannot be written .* it must be a folder"),
        alone_in(tmp_path / "file" / "x"),
    ):
        pass
