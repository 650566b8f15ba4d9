from pathlib import Path

import pytest

from influencespace.data.exports import export
from influencespace.data.locations import local_folder
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
