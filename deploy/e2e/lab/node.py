"""containerd and kubelet, in the node's network namespace."""

import json
import subprocess

from . import image
from .control_plane import NODE
from .fault import Fault
from .hosts import NODE_ADDRESS, PODS
from .processes import Process, wait_for

SOCKET = "/run/containerd/containerd.sock"


class Node:
    """The node of the cluster."""

    def __init__(self, parts, folder, hosts, control_plane, cgroup):
        self.parts, self.folder, self.hosts, self.control_plane = parts, folder, hosts, control_plane
        (folder / "cni").mkdir(parents=True)
        self.write_configuration(cgroup)
        search_path = f"{parts.bin}:/usr/sbin:/usr/bin:/sbin:/bin"
        self.containerd = Process(
            "containerd", hosts.node_command(parts.path("containerd"), "--config", folder / "containerd.toml"),
            control_plane.logs / "containerd.log", env={"PATH": search_path})
        wait_for("containerd answers", lambda: self.ctr("version").returncode == 0, 60, self.containerd)
        self.load_image()

    def load_image(self):
        """Imports the image of all pods."""
        archive = self.folder / "image.tar"
        image.write(self.parts, archive)
        self.load(archive)

    def load(self, archive):
        """Imports images from a file."""
        done = self.ctr("images", "import", archive)
        if done.returncode != 0:
            raise Fault(f"ctr images import {archive}: {done.stderr.strip()}")

    def start_kubelet(self):
        """Starts kubelet and waits until the node is ready."""
        self.kubelet = Process(
            "kubelet", self.hosts.node_command(
                self.parts.path("kubelet"), f"--config={self.folder / 'kubelet.yaml'}",
                f"--kubeconfig={self.control_plane.kubeconfigs['kubelet']}", f"--hostname-override={NODE}",
                f"--node-ip={NODE_ADDRESS}", f"--root-dir={self.folder / 'kubelet'}", "--v=2"),
            self.control_plane.logs / "kubelet.log")
        wait_for("the node is ready", self.is_ready, 120, self.containerd, self.kubelet)

    def is_ready(self):
        """Whether the node reports that it is ready."""
        path = "jsonpath={.items[*].status.conditions[?(@.type=='Ready')].status}"
        return self.control_plane.kubectl("get", "nodes", "-o", path, check=False).stdout.strip() == "True"

    def ctr(self, *arguments):
        """Runs containerd's own client."""
        return subprocess.run([self.parts.path("ctr"), f"--address={SOCKET}", "--namespace=k8s.io", *arguments],
                              capture_output=True, text=True, check=False)

    def write_configuration(self, cgroup):
        """Writes the files of containerd, kubelet and the network plugin."""
        folder, bin_ = self.folder, self.parts.bin
        (folder / "containerd.toml").write_text(f"""\
version = 3
root = "{folder}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt"]
[grpc]
address = "{SOCKET}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{image.NAME}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true # root without CAP_SYS_RESOURCE may not lower it
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["{bin_}"]
conf_dir = "{folder}/cni"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "{bin_}/runc"
SystemdCgroup = false
""")
        (folder / "cni/10-pods.conflist").write_text(json.dumps({
            "cniVersion": "1.0.0", "name": "pods", "plugins": [{
                "type": "ptp", "ipMasq": False, "ipam": {
                    "type": "host-local", "dataDir": f"{folder}/addresses",
                    "ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}))
        (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        cert, key = self.control_plane.kubelet_serving
        (folder / "kubelet.yaml").write_text(json.dumps({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            "address": NODE_ADDRESS, "tlsCertFile": str(cert), "tlsPrivateKeyFile": str(key),
            "authentication": {"x509": {"clientCAFile": str(self.control_plane.ca.cert)},
                               "webhook": {"enabled": True}, "anonymous": {"enabled": False}},
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": f"unix://{SOCKET}", "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{cgroup}", "failCgroupV1": False, "failSwapOn": False,
            "makeIPTablesUtilChains": False, "resolvConf": f"{folder}/resolv.conf", "clusterDNS": ["10.96.0.10"],
            "volumePluginDir": f"{folder}/plugins", "shutdownGracePeriod": "0s",
            # A disk that is nearly full is no reason to fail here.
            "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%",
                             "nodefs.inodesFree": "1%"},
            "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        }))
