"""Curation that was killed, and curation by several ranks, make what an undisturbed run makes."""
import json
import os
import signal
import subprocess
import time

import pytest
from films import run, tree
from test_curate import arguments

import curate


@pytest.fixture(scope="module")
def undisturbed(few_videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curate.concurrent.futures, "ProcessPoolExecutor", Here)
        patch.setattr("sys.argv", list(map(str, run(few_videos, out)[1:])))
        curate.main()
    curate.worker.cache_clear()
    assert len(list(out.glob("t*/*.mp4"))) == 4
    return out


def test_killed_and_restarted_it_makes_the_same(few_videos, undisturbed, tmp_path):
    for stage in ("detect", "write"):                                           # in the middle of the first and of the last
        process = subprocess.Popen(run(few_videos, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while len(list((tmp_path / stage).glob("*.json"))) < 2 and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "manifest.jsonl").exists()
    assert subprocess.run(run(few_videos, tmp_path), capture_output=True).returncode == 0
    assert tree(tmp_path) == tree(undisturbed)


def test_four_ranks_make_what_one_makes(few_videos, undisturbed, tmp_path, monkeypatch):
    a = arguments(tmp_path)
    monkeypatch.setattr(curate.concurrent.futures, "ProcessPoolExecutor", Here)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank in (2, 0, 3, 1):
        monkeypatch.setenv("RANK", str(rank))
        curate.run_stage("detect", curate.list_sources(few_videos, tmp_path), a)
    for path in (undisturbed / "detect").iterdir():
        assert json.loads((tmp_path / "detect" / path.name).read_text())["candidates"] == json.loads(path.read_text())["candidates"]
    curate.worker.cache_clear()


class Here:
    """A pool that works in this process."""

    def __init__(self, *_):
        pass

    def submit(self, function, *given):
        future = curate.concurrent.futures.Future()
        try:
            future.set_result(function(*given))
        except Exception as e:
            future.set_exception(e)
        return future

    def shutdown(self):
        pass
