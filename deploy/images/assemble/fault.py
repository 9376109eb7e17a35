"""Faults with their remedies, and the programs that a build needs."""

import shutil
import subprocess
import sys


class Fault(Exception):
    """A reason to end, which names the remedy."""

    code = 1

    def report(self):
        """Prints the fault. Returns the exit code."""
        print(f"deploy/images/build: {self}", file=sys.stderr)
        return self.code


class Unreachable(Fault):
    """Debian packages that cannot be downloaded: without them there is no image."""

    code = 3


def run(*command, remedy="", fault=Fault, **options):
    """Output of a program. `remedy` is what to do when it fails."""
    done = subprocess.run(command, capture_output=True, check=False, **options)
    if done.returncode != 0:
        words = done.stderr.decode(errors="replace").strip()
        raise fault(f"{' '.join(map(str, command))} failed: {words}" + (f"\n{remedy}" if remedy else ""))
    return done.stdout


def program(name, package):
    """Path of a program, which this Debian package has."""
    path = shutil.which(name)
    if path is None:
        raise Fault(f"{name} is not installed: apt-get install {package}")
    return path
