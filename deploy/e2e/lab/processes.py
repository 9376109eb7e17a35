"""Long-running processes of the cluster, each with a log file."""

import os
import signal
import subprocess
import time

from .fault import Fault


class Process:
    """A process that runs until it is stopped."""

    def __init__(self, name, command, log, **options):
        self.name = name
        self.command = [str(part) for part in command]
        self.log = log
        self.options = options
        self.child = None
        self.start()

    def start(self):
        """Starts it, again if it was stopped. Its log is continued."""
        with open(self.log, "a") as log:
            self.child = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                **self.options)

    def stop(self, number=signal.SIGTERM, seconds=30):
        """Sends a signal and waits for the end. A process that takes longer is killed."""
        if self.child.poll() is None:
            os.kill(self.child.pid, number)
            try:
                self.child.wait(seconds)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()

    def check(self):
        """Raises a fault if it has ended."""
        if self.child.poll() is not None:
            raise Fault(f"{self.name} ended with code {self.child.returncode}:\n{self.tail()}")

    def tail(self):
        """The last lines of its log."""
        with open(self.log, errors="replace") as log:
            return "".join(log.readlines()[-12:]).strip() + f"\nall of it: {self.log}"


def wait_for(what, ready, seconds, *processes):
    """Waits until `ready` returns something true, and returns that. The processes must go on meanwhile."""
    end = time.monotonic() + seconds
    while True:
        if result := ready():
            return result
        for process in processes:
            process.check()
        if time.monotonic() > end:
            logs = "".join(f"\n{process.name}: {process.tail()}" for process in processes)
            raise Fault(f"{what}: not within {seconds} s{logs}")
        time.sleep(0.1)
