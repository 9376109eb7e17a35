"""What kubectl and kube-apiserver do through the tunnel. A check raises an exception when something is wrong."""

import hashlib
import itertools
import os
import pty
import re
import select
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

from .control_plane import NODE
from .fault import Fault
from .pods import GROUP, HOOKED, WEB_BYTES

DEADLINE = 60  # seconds of a check that moves few bytes
LINES = 30
NUMBERS = itertools.count(1)


class Lab:
    """What the checks use."""

    def __init__(self, control_plane, folder, copy_mib):
        self.control_plane, self.kubectl, self.folder = control_plane, control_plane.kubectl, folder
        self.copy_mib = copy_mib

    def unique(self):
        """A number that no other check has."""
        return next(NUMBERS)

    def interactive(self, *arguments, **options):
        """kubectl with pipes."""
        return subprocess.Popen(self.control_plane.kubectl_command(*arguments), stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def expect(condition, text):
    """Fails the check unless the condition holds."""
    if not condition:
        raise Fault(text)


def run_exec(lab):
    """`kubectl exec` over WebSocket: output, error output and exit code of a command."""
    script = "echo out; echo err >&2; exit 7"
    done = lab.kubectl("exec", "probe", "--", "sh", "-c", script, check=False, timeout=DEADLINE)
    expect(done.stdout == "out\n" and "err\n" in done.stderr and done.returncode == 7,
           f"code {done.returncode}, output {done.stdout!r}, {done.stderr!r}")


def run_exec_spdy(lab):
    """`kubectl exec` over SPDY."""
    done = lab.kubectl("exec", "-i", "probe", "--", "sha256sum", input="a line\n", timeout=DEADLINE,
                       env=os.environ | {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false"})
    expect(done.stdout.split()[:1] == [hashlib.sha256(b"a line\n").hexdigest()], f"output {done.stdout!r}")


def run_exec_pty(lab):
    """`kubectl exec -it`: a shell on a terminal, with its size, and the exit code of what was typed last."""
    controller, terminal = pty.openpty()
    subprocess.run(["stty", "rows", "31", "columns", "97"], stdin=terminal, check=True)
    shell = subprocess.Popen(lab.control_plane.kubectl_command("exec", "-it", "probe", "--", "sh"), stdin=terminal,
                             stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    try:
        read_until(controller, b"# ")
        os.write(controller, b"tty; stty size\n")
        seen = read_until(controller, b"31 97")
        expect(b"/dev/pts/" in seen, f"no terminal, but {seen!r}")
        # Ctrl-C reaches the command and not the shell. The quotes are in what is typed and not in the output.
        os.write(controller, b"echo star''ted; sleep 1000\n")
        read_until(controller, b"started")
        os.write(controller, b"\x03")
        read_until(controller, b"# ")
        os.write(controller, b"exit 9\n")
        expect(shell.wait(DEADLINE) == 9, f"exit code {shell.returncode}")
    finally:
        shell.kill()
        shell.wait()
        os.close(controller)


def read_until(descriptor, wanted, seconds=DEADLINE):
    """Reads from a pipe or a terminal until these bytes came."""
    end, seen = time.monotonic() + seconds, b""
    while wanted not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(end - time.monotonic(), 0))
        expect(ready, f"{wanted!r} did not come within {seconds} s, but {seen[-200:]!r}")
        try:
            read = os.read(descriptor, 4096)
        except OSError:
            read = b""  # the other side of a terminal was closed
        expect(read, f"the end came before {wanted!r}, after {seen[-200:]!r}")
        seen += read
    return seen


def run_attach(lab):
    """`kubectl attach -i`: a line there and back."""
    word = f"line-{lab.unique()}"
    attached = lab.interactive("attach", "-i", "echo")
    try:
        attached.stdin.write(f"{word}\n".encode())
        attached.stdin.flush()
        read_until(attached.stdout.fileno(), f"got:{word}\n".encode())
    finally:
        end(attached)


def end(process):
    """Ends a kubectl that would go on."""
    process.kill()
    process.communicate()


def run_logs(lab):
    """`kubectl logs -f`: lines as they are written, all of them in order."""
    follower = lab.interactive("logs", "-f", "--tail=1", "ticker")
    try:
        seen = b""
        while seen.count(b"\n") < LINES:
            seen += read_until(follower.stdout.fileno(), b"\n")
        numbers = [int(line.split()[1]) for line in seen.decode().splitlines()[:LINES]]
        expect(numbers == list(range(numbers[0], numbers[0] + LINES)), f"lines are {numbers}")
    finally:
        end(follower)


def run_port_forward(lab):
    """`kubectl port-forward`: 1 MiB over HTTP, five times, two of them at once."""
    forwarder = lab.interactive("port-forward", "pod/web", ":8080")
    try:
        seen = read_until(forwarder.stdout.fileno(), b"->").decode()
        url = f"http://127.0.0.1:{re.search(r'127.0.0.1:([0-9]+)', seen)[1]}/data"
        with urllib.request.urlopen(url, timeout=DEADLINE) as first:
            sums = {hashlib.sha256(urllib.request.urlopen(url, timeout=DEADLINE).read()).hexdigest()
                    for _ in range(4)}
            content = first.read()
        expect(len(content) == WEB_BYTES and sums == {hashlib.sha256(content).hexdigest()},
               f"{len(content)} bytes, {len(sums)} checksums")
    finally:
        end(forwarder)


def run_copy_to(lab):
    """`kubectl cp` of a big file to the pod, and its checksum there."""
    source = big_file(lab)
    lab.kubectl("cp", source, "probe:/tmp/copied", timeout=DEADLINE * 5)
    there = lab.kubectl("exec", "probe", "--", "sha256sum", "/tmp/copied", timeout=DEADLINE).stdout.split()[0]
    expect(there == sum_of(source), "the file differs")


def run_copy_from(lab):
    """`kubectl cp` of a big file from the pod, and its checksum."""
    script = f"[ -f /tmp/made ] || head -c {lab.copy_mib << 20} /dev/urandom >/tmp/made; sha256sum /tmp/made"
    there = lab.kubectl("exec", "probe", "--", "sh", "-c", script, timeout=DEADLINE).stdout.split()[0]
    target = lab.folder / f"from-{lab.unique()}"
    try:
        lab.kubectl("cp", "probe:/tmp/made", target, timeout=DEADLINE * 5)
        expect(sum_of(target) == there, "the file differs")
    finally:
        target.unlink(missing_ok=True)


def big_file(lab):
    """A file of random bytes."""
    path = lab.folder / "big"
    if not path.exists():
        path.write_bytes(os.urandom(lab.copy_mib << 20))
    return path


def sum_of(path):
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def run_debug(lab):
    """`kubectl debug`: an ephemeral container in a pod, with a command's output."""
    word = f"debug-{lab.unique()}"
    debugger = lab.interactive("debug", "probe", "-i", "--image=localhost/lab:1", "--image-pull-policy=Never",
                               f"--container={word}", "--", "sh", "-c", f"read line; echo $line {word}")
    try:
        # kubectl may leave without the output when its input ends first, so that stays open.
        debugger.stdin.write(b"hello\n")
        debugger.stdin.flush()
        read_until(debugger.stdout.fileno(), f"hello {word}".encode())
    finally:
        end(debugger)


def run_metrics(lab):
    """Metrics of kubelet and cAdvisor, and the summary that `kubectl top` is made from."""
    for path, wanted in {"metrics": "kubelet_running_pods", "metrics/cadvisor": "container_cpu_usage_seconds_total",
                         "stats/summary": '"nodeName"'}.items():
        text = lab.kubectl("get", "--raw", f"/api/v1/nodes/{NODE}/proxy/{path}", timeout=DEADLINE).stdout
        expect(wanted in text, f"{path} lacks {wanted}")


def run_proxy(lab):
    """The API's proxy to a pod: 1 MiB."""
    path = "/api/v1/namespaces/default/pods/web:8080/proxy/data"
    content = lab.kubectl("get", "--raw", path, timeout=DEADLINE, text=False).stdout
    expect(len(content) == WEB_BYTES, f"{len(content)} bytes")


def run_mutating(lab):
    """A mutating webhook on the node: the label that it adds."""
    name = f"plain-{lab.unique()}"
    lab.kubectl("create", "configmap", name, f"--namespace={HOOKED}", timeout=DEADLINE)
    label = lab.kubectl("get", "configmap", name, f"--namespace={HOOKED}", "-o=jsonpath={.metadata.labels.mutated}")
    expect(label.stdout == "yes", f"label is {label.stdout!r}")


def run_validating(lab):
    """A validating webhook on the node: its refusal, with its text."""
    done = lab.kubectl("create", "configmap", "forbidden", f"--namespace={HOOKED}", check=False, timeout=DEADLINE)
    expect(done.returncode != 0 and "the lab forbids this name" in done.stderr, f"answer {done.stderr!r}")


def run_aggregated(lab):
    """An aggregated API on the node: small and large objects, and the availability that kube-apiserver reports."""
    end_at = time.monotonic() + DEADLINE
    while True:
        status = lab.kubectl("get", "apiservice", f"v1.{GROUP}",
                             "-o=jsonpath={.status.conditions[?(@.type=='Available')]}").stdout
        if '"status":"True"' in status:
            break
        expect(time.monotonic() < end_at, f"not available: {status}")
        time.sleep(0.5)
    for size in (10, 1_000_000):
        text = lab.kubectl("get", "--raw", f"/apis/{GROUP}/v1/payloads/{size}", timeout=DEADLINE).stdout
        expect(text.count("x") >= size, f"{len(text)} bytes")


CHECKS = {
    "exec": run_exec,
    "exec over SPDY": run_exec_spdy,
    "exec -it": run_exec_pty,
    "attach -i": run_attach,
    "logs -f": run_logs,
    "port-forward": run_port_forward,
    "cp to the pod": run_copy_to,
    "cp from the pod": run_copy_from,
    "debug": run_debug,
    "node metrics": run_metrics,
    "proxy to a pod": run_proxy,
    "mutating webhook": run_mutating,
    "validating webhook": run_validating,
    "aggregated API": run_aggregated,
}


def free_of_route(address, port):
    """Whether a connection without the tunnel is impossible."""
    with socket.socket() as plain:
        plain.settimeout(3)
        return plain.connect_ex((address, port)) != 0
