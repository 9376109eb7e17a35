"""A compilation of Go programs that says how far it is: the first one takes half an hour."""

import os
import subprocess
import threading
import time

from . import isolation
from .fault import Fault

# Seconds between two lines about the same program.
INTERVAL = 20
# A package that Go's build cache lacks. Modules that have the same version of it share it.
LACKING = "{{if .Stale}}{{.ImportPath}}{{with .Module}}@{{.Version}}{{end}}{{end}}"


class Compilation:
    """The packages of all programs, and the number of those that have been compiled."""

    def __init__(self):
        self.packages = set()
        self.compiled = 0
        self.started = None

    def expect(self, module, packages, flags):
        """Adds the packages that these ones need and that are not compiled yet. Downloads the sources they lack."""
        print(f"reading the sources of {module.name}, which are downloaded the first time", flush=True)
        downloads = []
        listed = go(module, ["list", "-deps", *flags, "-f", LACKING, *packages], downloads.append,
                    lambda: f"{module.name}: {len(downloads)} Go modules downloaded")
        self.packages.update(listed.split())

    def build(self, module, name, command):
        """Compiles one program."""
        self.started = self.started or time.monotonic()
        print(f"compiling {name}: {self.progress()}", flush=True)
        go(module, command, self.count, lambda: f"{name}: {self.progress()}")

    def count(self, message):
        """Counts a package, which `go build -v` names when it begins with it."""
        self.compiled += not message.startswith("go: ")

    def progress(self):
        """How much is done, and when the rest will be."""
        done, seconds = self.compiled, time.monotonic() - self.started
        total = max(done, len(self.packages))
        text = f"{done} of {total} packages after {seconds:.0f} s"
        if seconds >= INTERVAL and done:
            text += f", about {seconds / done * (total - done) / 60:.0f} min left"
        return text


def go(module, command, on_message, status):
    """Runs a command of Go in a module, and prints the status every few seconds. Returns the output."""
    child = subprocess.Popen(["go", *map(str, command)], cwd=module, env=os.environ | {"CGO_ENABLED": "0"},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                             preexec_fn=isolation.die_with_parent)
    output, messages = [], []

    def read_messages():
        for message in child.stderr:
            messages.append(message)
            on_message(message)

    readers = [threading.Thread(target=read_messages), threading.Thread(target=lambda: output.extend(child.stdout))]
    for reader in readers:
        reader.start()
    while True:
        try:
            child.wait(INTERVAL)
            break
        except subprocess.TimeoutExpired:
            print(f"  {status()}", flush=True)
    for reader in readers:
        reader.join()
    if child.returncode != 0:
        raise Fault(f"go {' '.join(map(str, command))} in {module}: {''.join(messages[-20:]).strip()}")
    return "".join(output)
