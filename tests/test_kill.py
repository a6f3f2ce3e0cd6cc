"""Training that is killed goes on as if nothing had been."""
import subprocess
import time

from test_train import cache, command, run, same, two_blocks  # noqa: F401 (fixtures)


def test_killed_at_any_moment(cache, tmp_path, monkeypatch):  # noqa: F811
    """kill -9 a little later each time, also while a state is written: the final weights are those of an undisturbed run."""
    settings = "--batch", "2", "--steps", "12", "--save-minutes", "0"
    run(cache, tmp_path / "whole", monkeypatch, *settings, "--preview", "0")
    kills = 0
    for seconds in (0.1, 0.5, None):
        process = subprocess.Popen(command(cache, tmp_path / "parts", *settings), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if seconds and "from step" in process.stdout.readline():                # under way
            time.sleep(seconds)
            process.kill()
            kills += 1
        process.communicate()
    assert process.returncode == 0 and kills == 2 and same(tmp_path / "whole", tmp_path / "parts")
