"""What every command promises about its errors."""

import subprocess


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """The exit code, `error:` with these words, `hint:`, and no traceback."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1, done.stderr
    assert any(line.startswith("hint: ") for line in lines), done.stderr
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr, done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in done.stderr, done.stderr
