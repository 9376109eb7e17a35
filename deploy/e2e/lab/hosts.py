"""The two hosts, and the link between them, which `culvert-loadtest hosts` emulates."""

import json
import subprocess

from .fault import Fault
from .isolation import enter_network

# The node's own address. The control plane has no route to it, as to a node behind NAT.
NODE_ADDRESS = "192.168.77.10"
PODS = "10.244.0.0/24"


class Hosts:
    """Network namespaces of the control plane and of the node, joined by a link."""

    def __init__(self, parts, delay_ms, log):
        self.delay_ms = delay_ms
        self.process = subprocess.Popen(
            [parts.path("culvert-loadtest"), "hosts", "--link", json.dumps(self.settings(0))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(log, "w"), text=True,
            start_new_session=True)
        line = self.process.stdout.readline()
        if not line:
            raise Fault(f"culvert-loadtest hosts ended: {open(log).read().strip()}")
        hosts = json.loads(line)
        self.control_plane = hosts["server"]["address"]
        self.node_namespace = hosts["node"]["namespace"]
        enter_network(hosts["server"]["namespace"])
        self.on_node("ip", "address", "add", f"{NODE_ADDRESS}/32", "dev", "lo")

    def settings(self, loss):
        """Settings of the link at this loss, in percent."""
        return {"each_way": {"delay_ms": self.delay_ms, "loss": loss / 100}}

    def node_command(self, *command):
        """The command that runs another on the node."""
        return ["nsenter", f"--net={self.node_namespace}", *map(str, command)]

    def on_node(self, *command):
        """Runs a command on the node."""
        subprocess.run(self.node_command(*command), check=True)

    def set_loss(self, percent):
        """Loses this share of the packets in each direction."""
        self.command({"set": self.settings(percent)})

    def set_udp(self, treatment):
        """What happens to UDP packets: pass or drop."""
        self.command({"udp": treatment})

    def command(self, command):
        """Sends a command to the link and waits until it was carried out."""
        self.send(json.dumps(command))

    def send(self, line):
        """Sends a line to the link and waits until it was carried out."""
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer != "ok":
            raise Fault(f"the link answered {answer!r} to {line}")
