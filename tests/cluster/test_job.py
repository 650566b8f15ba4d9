"""Stand-in while the pipeline is written."""

from pathlib import Path
import pytest

pytestmark = pytest.mark.cluster


def test_harness(head, tmp_path):
    script = tmp_path / "w"
    script.mkdir()
    (script / "x.py").write_text(
        "import influencespace,os,sys,ray; print(influencespace.__file__, os.getcwd(), sys.path[:3], os.environ.get('PYTHONPATH'), os.environ.get('RAY_ADDRESS'));ray.init();print(ray.cluster_resources())"
    )
    r = head.submit("python", "x.py", working_dir=script)
    print(r.stdout)
    assert r.returncode == 0
    r = head.submit(
        "python",
        "-c",
        "'import sys,os,influencespace;print(influencespace.__file__, os.getcwd(), os.listdir());sys.exit(2)'",
    )
    print(r.stdout)
    assert r.returncode == 1
