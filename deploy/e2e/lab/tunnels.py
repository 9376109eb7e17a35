"""The two systems under test: server beside kube-apiserver, agent on the node."""

from pathlib import Path

from .control_plane import NODE
from .parts import ROOT
from .processes import Process

SYSTEMS = ["culvert", "konnectivity"]
NAMES = {"culvert": "Culvert", "konnectivity": "Konnectivity", "grpc": "gRPC", "http-connect": "HTTP CONNECT"}
FRONTENDS = {"grpc": "GRPC", "http-connect": "HTTPConnect"}
AGENT_PORT = 8132
EGRESS = ROOT / "deploy/helm/rendered/kubeadm-egress-selector.yaml"
# The flags that differ: Konnectivity's default ports are others.
ADMIN_PORT, HEALTH_PORT, AGENT_ADMIN_PORT, AGENT_HEALTH_PORT = 8133, 8134, 8135, 8136


class Tunnel:
    """One system with one frontend: its two processes, which authenticate with certificates."""

    def __init__(self, system, frontend, parts, folder, hosts, control_plane, name=None):
        self.title = f"{NAMES[system]}, {NAMES[frontend]}"
        self.system, self.frontend = system, frontend
        self.parts, self.hosts, self.ca, self.logs = parts, hosts, control_plane.ca, control_plane.logs
        self.address = control_plane.address
        self.name = name or f"{system}-{frontend}"
        self.folder = folder / self.name
        self.folder.mkdir(parents=True)
        self.socket = Path("/run") / f"{self.name}.socket"
        self.issue_certificates()
        self.server = self.agent = None

    def issue_certificates(self):
        """Issues certificates for both sides, or new ones in their place."""
        self.server_pair = self.ca.issue(f"{self.name}-server", "tunnel-server", names=[f"IP:{self.address}"])
        self.agent_pair = self.ca.issue(f"{self.name}-agent", "tunnel-agent")

    def egress_file(self):
        """kube-apiserver's configuration, which names this frontend: the rendered one with its values."""
        text = EGRESS.read_text()
        for old, new in {
            "proxyProtocol: GRPC": f"proxyProtocol: {FRONTENDS[self.frontend]}",
            "/etc/kubernetes/konnectivity-server/konnectivity-server.socket": str(self.socket),
        }.items():
            assert old in text, f"{EGRESS} lacks {old}"
            text = text.replace(old, new)
        path = self.folder / "egress.yaml"
        path.write_text(text)
        return path

    def operator(self, side):
        """Flags of the socket for an operator's commands, which Konnectivity lacks."""
        return [f"--operator-socket={self.operator_socket(side)}"] if self.system == "culvert" else []

    def operator_socket(self, side):
        """Path of the socket for an operator's commands."""
        return self.folder / f"{side}.sock"

    def start(self):
        """Starts both sides."""
        self.server = Process(f"{self.system}-server", [
            self.parts.path(f"{self.system}-server"), f"--mode={self.frontend}", f"--uds-name={self.socket}",
            "--server-port=0", f"--cluster-cert={self.server_pair[0]}", f"--cluster-key={self.server_pair[1]}",
            f"--cluster-ca-cert={self.ca.cert}", f"--agent-port={AGENT_PORT}", f"--admin-port={ADMIN_PORT}",
            f"--health-port={HEALTH_PORT}", "--delete-existing-uds-file", *self.operator("server")],
            self.logs / f"{self.name}-server.log")
        self.agent = Process(f"{self.system}-agent", self.hosts.node_command(
            self.parts.path(f"{self.system}-agent"), f"--proxy-server-host={self.address}",
            f"--proxy-server-port={AGENT_PORT}", f"--ca-cert={self.ca.cert}", f"--agent-cert={self.agent_pair[0]}",
            f"--agent-key={self.agent_pair[1]}", f"--health-server-port={AGENT_HEALTH_PORT}",
            f"--admin-server-port={AGENT_ADMIN_PORT}", f"--agent-id={NODE}", *self.operator("agent")),
            self.logs / f"{self.name}-agent.log")

    def deploy(self):
        """Creates what the cluster runs for it, once it can."""

    def restart_agent(self, number):
        """Ends the agent by a signal and starts it again."""
        self.agent.stop(number)
        self.agent.start()

    def restart_server(self):
        """Stops the server and starts it again."""
        self.server.stop()
        self.server.start()

    def stop_agent(self):
        """Ends the agent."""
        self.agent.stop()

    def start_agent(self):
        """Starts the agent again."""
        self.agent.start()

    def running(self):
        """The processes that have to go on."""
        return [process for process in (self.server, self.agent) if process]

    def stop(self):
        """Ends both sides."""
        for process in reversed(self.running()):
            process.stop()
