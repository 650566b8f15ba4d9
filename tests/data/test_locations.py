import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from influencespace.data.exports import export
from influencespace.data.locations import LOCK, alone_in, folder_of, local_folder
from influencespace.errors import InputError

URLS = {
    "https://host/x": "no run and no export can be there",
    "s3::memory://x": "no run and no export can be there",
    "memory://": "names no folder",
    "memory://a//b": "names no folder",
    "memory://a/../b": "names no folder",
    "nothing://x": "is no storage that fsspec knows",
}


@pytest.mark.parametrize(("url", "reason"), URLS.items())
def test_a_url_that_names_no_folder_is_refused_and_no_folder_made_of_it(
    url: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"--out .*{reason}"):
        folder_of(url, "--out")
    with pytest.raises(InputError, match="--out"):
        export(tmp_path, "npy", url)
    assert not list(tmp_path.iterdir())


def test_what_stays_on_this_machine_takes_no_url() -> None:
    for url in ("memory://x", Path("s3://bucket/x")):  # pathlib makes `s3:/bucket` of `s3://bucket`
        with pytest.raises(InputError, match=r"it is small\. Give a local or mounted folder"):
            local_folder(url, "--out", "it is small")


@pytest.mark.parametrize("path", ["out", "/tmp/out", "a:b/c", "../out", "C:/out", "~/out", "."])
def test_paths_are_folders(path: str) -> None:
    assert folder_of(path, "--out") == folder_of(Path(path), "--out") == Path(path)
    assert local_folder(path, "--out", "") == Path(path)


def test_a_url_of_this_machine_is_its_folder() -> None:
    assert folder_of("file:///tmp/x", "--out") == folder_of(Path("file:///tmp/x"), "--out") == Path("/tmp/x")


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
