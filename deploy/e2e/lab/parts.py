"""The programs of the cluster: compiled from Go modules, or unpacked from Debian's packages. Nothing is installed."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from .compilation import Compilation
from .fault import Fault, Missing

HERE = Path(__file__).resolve().parent.parent
ROOT = HERE.parent.parent

# Modules, and the programs in them: package, name of the file.
MODULES = {
    HERE / "runtime": {
        "github.com/containerd/containerd/v2/cmd/containerd": "containerd",
        "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2": "containerd-shim-runc-v2",
        "github.com/containerd/containerd/v2/cmd/ctr": "ctr",
        "github.com/containernetworking/plugins/plugins/ipam/host-local": "host-local",
        "github.com/containernetworking/plugins/plugins/main/loopback": "loopback",
        "github.com/containernetworking/plugins/plugins/main/ptp": "ptp",
        "go.etcd.io/etcd/server/v3": "etcd",
    },
    HERE / "kubernetes": {
        "k8s.io/kubernetes/cmd/kube-apiserver": "kube-apiserver",
        "k8s.io/kubernetes/cmd/kube-controller-manager": "kube-controller-manager",
        "k8s.io/kubernetes/cmd/kube-scheduler": "kube-scheduler",
        "k8s.io/kubernetes/cmd/kubelet": "kubelet",
        "k8s.io/kubernetes/cmd/kubectl": "kubectl",
    },
    HERE / "services": {".": "services"},
    ROOT / "loadtest/konnectivity": {
        "sigs.k8s.io/apiserver-network-proxy/cmd/server": "konnectivity-server",
        "sigs.k8s.io/apiserver-network-proxy/cmd/agent": "konnectivity-agent",
    },
}
# Debian packages, and the program in each. runc is written in C too, and wants a C library.
PACKAGES = {"runc": "usr/sbin/runc", "busybox-static": "bin/busybox"}
TOOLS = {
    "go": "Go 1.26 or newer",
    "ip": "apt-get install iproute2",
    "nsenter": "apt-get install util-linux",
    "openssl": "apt-get install openssl",
    "unshare": "apt-get install util-linux",
}
CULVERT = ["culvert-server", "culvert-agent", "culvert-loadtest"]


class Parts:
    """Paths of all programs."""

    def __init__(self, work, programs):
        self.work = work
        self.bin = work / "bin"
        self.programs = programs

    def path(self, name):
        """Path of a program by its name."""
        return self.programs / name if name in CULVERT else self.bin / name

    def versions(self):
        """Versions of what the results depend on."""
        return {
            "Kubernetes": module_version(HERE / "kubernetes", "k8s.io/kubernetes"),
            "containerd": module_version(HERE / "runtime", "github.com/containerd/containerd/v2"),
            "etcd": module_version(HERE / "runtime", "go.etcd.io/etcd/server/v3"),
            "runc": output(self.bin / "runc", "--version").split("\n")[0].split()[-1],
            "Konnectivity": module_version(ROOT / "loadtest/konnectivity", "sigs.k8s.io/apiserver-network-proxy"),
            "Culvert": output(self.path("culvert-server"), "--version").split("\n")[0].split(maxsplit=1)[-1],
            "kernel": os.uname().release,
        }


def prepare(parts):
    """Makes the programs that are not there yet. Raises Missing where the machine lacks something."""
    check_machine(parts)
    parts.bin.mkdir(parents=True, exist_ok=True)
    compile_modules(parts)
    for package, path in PACKAGES.items():
        unpack(parts, package, path)


def check_machine(parts):
    """Names everything that is missing at once."""
    missing = [f"{name} is not installed: {remedy}" for name, remedy in TOOLS.items() if not shutil.which(name)]
    if os.geteuid() != 0:
        missing.append("kubelet and containerd need root: run this as root")
    if not Path("/dev/net/tun").exists():
        missing.append("there is no /dev/net/tun: modprobe tun")
    if "overlay" not in Path("/proc/filesystems").read_text():
        missing.append("the kernel lacks overlayfs: modprobe overlay")
    absent = [name for name in CULVERT if not (parts.programs / name).exists()]
    if absent:
        crates = " ".join(f"-p {name}" for name in CULVERT)
        missing.append(f"{parts.programs} lacks {', '.join(absent)}: cargo build --release {crates}")
    if missing:
        raise Missing("\n".join(missing))


def compile_modules(parts):
    """Compiles the programs of all modules, unless these versions are there."""
    compilation, missing = Compilation(), {}
    for module, programs in MODULES.items():
        wanted = hashlib.sha256(b"".join(path.read_bytes() for path in sources(module))).hexdigest()
        stamp = parts.bin / f".{module.name}"
        made = all((parts.bin / name).exists() for name in programs.values())
        if not (made and stamp.exists() and stamp.read_text() == wanted):
            missing[module] = (programs, stamp, wanted)
    for module, (programs, _, _) in missing.items():
        compilation.expect(module, programs, linker_flags(module))
    for module, (programs, stamp, wanted) in missing.items():
        for package, name in programs.items():
            compilation.build(module, name, ["build", "-v", *linker_flags(module), "-o", parts.bin / name, package])
        stamp.write_text(wanted)


def sources(module):
    """The files that decide on what is compiled."""
    return [path for path in (module / "go.mod", module / "go.sum", *sorted(module.glob("*.go"))) if path.exists()]


def build_suite(parts):
    """Compiles the tests of Kubernetes and the program of their image."""
    module = HERE / "kubernetes"
    flags = linker_flags(module)
    missing = {name: (command, package) for name, (command, package) in {
        "agnhost": (["build"], "k8s.io/kubernetes/test/images/agnhost"),
        "e2e.test": (["test", "-c"], "k8s.io/kubernetes/test/e2e"),
    }.items() if not (parts.bin / name).exists()}
    compilation = Compilation()
    if missing:
        compilation.expect(module, [package for _, package in missing.values()], ["-test", *flags])
    for name, (command, package) in missing.items():
        compilation.build(module, name, [*command, "-v", *flags, "-o", parts.bin / name, package])


def build_images(parts):
    """Builds the images of Culvert from its programs."""
    print("building images", flush=True)
    output(ROOT / "deploy/images/build", "--output", parts.work / "images", "--binaries", parts.programs,
           "--gzip-level", "1", "--max-size", "0")


def linker_flags(module):
    """Flags that leave out debug information, and give Kubernetes' programs their version."""
    flags = ["-s", "-w"]
    if module.name == "kubernetes":
        version = module_version(module, "k8s.io/kubernetes")
        major, minor = version.removeprefix("v").split(".")[:2]
        for name, value in {"gitVersion": version, "gitMajor": major, "gitMinor": minor}.items():
            flags.append(f"-X k8s.io/component-base/version.{name}={value}")
    return ["-ldflags", " ".join(flags)]


def module_version(module, path):
    """Version of a dependency in a go.mod."""
    for line in (module / "go.mod").read_text().splitlines():
        words = line.removeprefix("require ").split()
        if len(words) > 1 and words[0] == path and words[1].startswith("v"):
            return words[1]
    raise Fault(f"{module}/go.mod lacks {path}")


def module_folder(module, path):
    """Folder of the sources of a dependency."""
    done = subprocess.run(["go", "list", "-m", "-f", "{{.Dir}}", path], cwd=module, capture_output=True, text=True,
                          check=True)
    return done.stdout.strip()


def unpack(parts, package, path):
    """Takes one program from a Debian package, without installing it, or the installed one."""
    target = parts.bin / Path(path).name
    if target.exists():
        return
    installed = Path("/") / path
    if installed.exists():
        shutil.copy(installed, target)
        return
    folder = parts.work / "packages" / package
    folder.mkdir(parents=True, exist_ok=True)
    print(f"unpacking {package}", flush=True)
    done = subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, text=True, check=False)
    debs = sorted(folder.glob("*.deb"))
    if done.returncode != 0 or not debs:
        raise Missing(f"{package} cannot be downloaded: apt-get install {package}\n{done.stderr.strip()}")
    output("dpkg-deb", "-x", debs[-1], folder)
    shutil.copy(folder / path, target)


def output(*command):
    """Output of a program that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Fault(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
    return done.stdout
