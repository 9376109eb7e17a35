"""Culvert as the Helm chart deploys it for kubeadm: the agent is a DaemonSet with projected tokens, from its image. The
server runs with the arguments of the static pod."""

import json
import os
import re
import signal
import time
from pathlib import Path

from .parts import ROOT
from .processes import Process
from .tunnels import Tunnel

RENDERED = ROOT / "deploy/helm/rendered"
AGENT = "daemonset/culvert-agent"
SOCKET = "/etc/kubernetes/konnectivity-server/konnectivity-server.socket"


class ChartTunnel(Tunnel):
    """Culvert from the chart, with the gRPC frontend."""

    def __init__(self, parts, folder, hosts, control_plane, node):
        self.control_plane, self.node = control_plane, node
        super().__init__("culvert", "grpc", parts, folder, hosts, control_plane, name="chart")
        self.title = "Culvert from the chart"

    def issue_certificates(self):
        """Issues a certificate of kube-apiserver, which the server presents too."""
        super().issue_certificates()
        self.control_plane.issue_serving()

    def start(self):
        """Starts the server with the arguments of the chart's pod."""
        pod = (RENDERED / "kubeadm-static-pod.yaml").read_text()
        arguments = re.findall(r"^    - (--\S+)$", pod, re.MULTILINE)
        pki = self.control_plane.folder / "pki"
        Path("/run/culvert-server").mkdir(exist_ok=True)
        replaced = {"/etc/kubernetes/pki": str(pki), SOCKET: str(self.socket), "$(POD_IP)": self.address,
                    "/etc/kubernetes/konnectivity-server.conf": str(pki / "konnectivity-server.conf"),
                    "--server-count=3": "--server-count=1"}
        for old, new in replaced.items():
            arguments = [argument.replace(old, new) for argument in arguments]
        self.server = Process("culvert-server", [self.parts.path("culvert-server"), *arguments],
                              self.logs / "chart-server.log")

    def deploy(self):
        """Loads the agent's image and creates the DaemonSet and the permissions."""
        self.node().load(self.parts.work / "images/culvert-agent.oci.tar")
        text = (RENDERED / "kubeadm.yaml").read_text().replace("control-plane.example.com", self.address)
        self.control_plane.kubectl("apply", "-f", "-", input=text)
        self.wait()

    def wait(self):
        """Waits until the agent's pod is ready."""
        self.control_plane.kubectl("-n", "kube-system", "rollout", "status", AGENT, "--timeout=120s", timeout=130)

    def restart_agent(self, number):
        """By a rollout, or by the end of the agent's process, after which kubelet starts another."""
        if number == signal.SIGTERM:
            self.control_plane.kubectl("-n", "kube-system", "rollout", "restart", AGENT)
            time.sleep(1)
        else:
            for process in agents():
                os.kill(process, number)
        self.wait()

    def stop_agent(self):
        """Keeps the DaemonSet from the node, and waits until its pod is gone."""
        self.select_nodes("none")
        end = time.monotonic() + 60
        while list(agents()) and time.monotonic() < end:
            time.sleep(0.1)

    def start_agent(self):
        """Lets the DaemonSet have a pod on the node again."""
        self.select_nodes("linux")
        self.wait()

    def select_nodes(self, system):
        """Selects nodes with this operating system."""
        patch = {"spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/os": system}}}}}
        self.control_plane.kubectl("-n", "kube-system", "patch", AGENT, "--patch", json.dumps(patch))

    def stop(self):
        """Removes the DaemonSet and ends the server."""
        self.control_plane.kubectl("-n", "kube-system", "delete", AGENT, "--cascade=foreground", timeout=120)
        super().stop()


def agents():
    """Agents in this PID namespace, which has the processes of the lab alone."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(b"/culvert-agent\0"):
                yield int(folder.name)
        except OSError:
            continue  # it has ended
