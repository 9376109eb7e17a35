"""Namespaces of processes, mounts and cgroups, so that nothing outlasts a run, whatever ends it.

The lab is the first process of a PID namespace: when it ends, the kernel ends every process of the cluster, containers
too. Their mounts and network namespaces go with the last of them. What remains are empty cgroups.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PR_SET_PDEATHSIG = 1
CLONE_NEWNET = 0x40000000
# What kubelet would set for the whole machine. It finds these values and sets nothing.
KERNEL = {
    "vm/overcommit_memory": 1, "vm/panic_on_oom": 0, "kernel/panic": 10, "kernel/panic_on_oops": 1,
    "kernel/keys/root_maxkeys": 1000000, "kernel/keys/root_maxbytes": 25000000,
}
libc = ctypes.CDLL(None, use_errno=True)


def run_inside(arguments, cgroup, minutes, pid_file):
    """Runs this program again with these arguments in namespaces of its own. Returns its exit code. The file gets the
    process id of its first process, as it is outside."""
    make_cgroup(cgroup)
    command = ["unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc",
               "--ipc", "--uts", sys.executable, *arguments]
    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    # The terminal sends SIGINT to the child too, which then ends by itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: child.kill())
    try:
        pid_file.write_text(str(first_process(child)))
        return child.wait(timeout=minutes * 60)
    except subprocess.TimeoutExpired:
        print(f"the run was ended after {minutes} minutes", file=sys.stderr)
        return 1
    finally:
        child.kill()
        child.wait()
        remove_cgroup(cgroup)


def first_process(unshare):
    """The process that unshare has forked."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    while unshare.poll() is None:
        if pids := children.read_text().split():
            return int(pids[0])
        time.sleep(0.01)
    return 0


def die_with_parent():
    """Between fork and exec: a killed parent takes the child along."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hierarchies():
    """Roots of the cgroup hierarchies: one for each controller in version 1, the only one in version 2."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return [path for path in CGROUPS.iterdir() if path.is_dir() and (path / "cgroup.procs").exists()]


def make_cgroup(name):
    """Makes the cgroup of all pods."""
    for root in hierarchies():
        path = root / name
        path.mkdir(exist_ok=True)
        for setting in ("cpuset.mems", "cpuset.cpus"):
            if (root / "notify_on_release").exists() and (path / setting).exists():
                (path / setting).write_text((root / setting).read_text())


def remove_cgroup(name):
    """Removes the cgroup and those in it, once their processes are gone."""
    end = time.monotonic() + 20
    while left := [folder for root in hierarchies() for folder in remove_tree(root / name)]:
        if time.monotonic() > end:
            print(f"these are left: {' '.join(left)}", file=sys.stderr)
            return
        time.sleep(0.2)


def remove_tree(top):
    """Removes a cgroup and those in it. Returns those that are busy."""
    busy = []
    for folder, _, _ in os.walk(top, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            busy.append(folder)
    return busy


def private_mounts(work):
    """Gives the lab folders of its own in the places that kubelet and containerd write to."""
    for path in ("/run", "/var/log"):
        mount("-t", "tmpfs", "-o", "mode=755", "lab", path)
    folder = work / "sysctl"
    folder.mkdir(exist_ok=True)
    for name, value in KERNEL.items():
        file = folder / name.replace("/", ".")
        file.write_text(f"{value}\n")
        mount("--bind", str(file), f"/proc/sys/{name}")


def mount(*arguments):
    """Mounts, or raises an error."""
    subprocess.run(["mount", *arguments], check=True)


def enter_network(path):
    """Moves this process to a network namespace."""
    with open(path) as namespace:
        if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {path}")
