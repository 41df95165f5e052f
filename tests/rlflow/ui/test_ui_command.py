"""`rlflow ui` as it is called."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from rlflow.cli.main import main


def test_a_port_in_use_a_missing_directory_and_a_short_token_are_one_line_each(
    home: Path, capsys: pytest.CaptureFixture[str]
):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "runs", "--port", str(port)]) == 1
    assert capsys.readouterr().err == (
        f"port {port} of 127.0.0.1 is in use: name another with --port, or --port 0 for one that is free\n"
    )
    assert main(["ui", "nowhere"]) == 2
    assert capsys.readouterr().err == "there is no directory nowhere: name the one that holds runs' directories\n"
    assert main(["ui", "runs", "--token", "short"]) == 2
    assert "5 characters can be guessed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ui", "runs", "--port", "99999"])
    assert "99999 is no port" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_beyond_loopback_a_token_is_made_and_printed_and_sigterm_ends_the_server(home: Path, host: str):
    command = [sys.executable, "-m", "rlflow", "ui", "runs", "--port", "0", "--host", host]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ)) as process:
        try:
            assert process.stderr is not None
            said = process.stderr.readline()
            found = re.search(r"http://[^/]+:(\d+)/(?:\?token=(\S+))?", said)
            assert found is not None, said + process.stderr.read()
            port, token = found.groups()
            address = f"http://127.0.0.1:{port}/api/runs"
            if host == "127.0.0.1":
                assert token is None
                assert urllib.request.urlopen(address, timeout=10).status == 200
            else:
                with pytest.raises(urllib.error.HTTPError, match="401"):
                    urllib.request.urlopen(address, timeout=10)
                request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
                assert urllib.request.urlopen(request, timeout=10).status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
