"""Files from the network, taken only whole and with the checksum they must have."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kd.errors import WorkFailedError
from kd.io.files import whole_file
from kd.io.progress import progress

TIMEOUT_S = 30
CHUNK_BYTES = 2**16


def download(url: str, target: Path, sha256: str) -> None:
    """Fetch `url` to `target`; what `target` held before stays unless all bytes came and have the right SHA-256."""
    import requests

    digest = hashlib.sha256()
    try:
        with requests.get(url, stream=True, timeout=TIMEOUT_S) as response, whole_file(target) as work:
            response.raise_for_status()
            size = int(response.headers.get("Content-Length", 0)) or None
            with work.open("wb") as file, progress((), target.name, "B", size, scale=True) as bar:
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != sha256:
                raise WorkFailedError(
                    f"{url}: its SHA-256 is {digest.hexdigest()}, not {sha256}; it was not taken, try again later"
                )
    except requests.RequestException as error:
        raise WorkFailedError(
            f"{url}: {reason(error)}; run the same command again where there is a network, or name a mirror of that "
            "folder with --source"
        ) from None


def reason(error: Exception) -> str:
    """Why a request failed, in a few words without its address."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {TIMEOUT_S} s"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    return f"broken off ({type(error).__name__})"
