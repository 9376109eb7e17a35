"""What the repository says: version, commit, date, licence."""

import os
import subprocess
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .fault import Fault

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Facts:
    """What the labels of an image say."""

    version: str
    revision: str | None
    """The commit, with `-dirty` if the working tree differs from it. None outside of git."""
    license: str
    source: str | None
    epoch: int
    """Date of everything, in seconds since 1970."""

    @property
    def created(self):
        """The date as in RFC 3339."""
        return datetime.fromtimestamp(self.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def read_toml(name):
    """A TOML file of the repository."""
    return tomllib.loads((ROOT / name).read_text())


def version():
    """Culvert's version."""
    return read_toml("Cargo.toml")["workspace"]["package"]["version"]


def git(*args):
    """Output of git, or None where this is no checkout or git is not installed."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def repository():
    """Address of the git remote `origin`, if it is https without credentials."""
    address = git("remote", "get-url", "origin") or ""
    return address.removesuffix(".git") if address.startswith("https://") and "@" not in address else None


def facts(source):
    """The facts of this checkout."""
    package = read_toml("Cargo.toml")["workspace"]["package"]
    revision = os.environ.get("CULVERT_COMMIT") or git("rev-parse", "HEAD")
    if revision and git("status", "--porcelain", "--untracked-files=no"):
        revision += "-dirty"
    return Facts(package["version"], revision, package["license"], source, epoch())


def epoch():
    """Date of the files, from the environment or from the commit."""
    text = os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct")
    if text is None:
        raise Fault("there is no commit to take the date from: set SOURCE_DATE_EPOCH to seconds since 1970")
    if not text.isdigit():
        raise Fault(f"SOURCE_DATE_EPOCH is no number of seconds: {text}")
    return int(text)
