"""A run: the cluster, each system with each frontend on each link, and the tables."""

import os
import time

from . import isolation, pods, shortcuts, suite, table
from .chart import ChartTunnel
from .checks import CHECKS, Lab, free_of_route
from .control_plane import NODE, ControlPlane
from .fault import Fault
from .faults import FAULTS
from .hosts import NODE_ADDRESS, Hosts
from .node import Node
from .parts import Parts
from .processes import wait_for
from .tunnels import FRONTENDS, Tunnel

SUITE_MINUTES = 20
KUBELET_PORT = 10250


class Session:
    """The cluster, and what was measured so far."""

    def __init__(self, args):
        self.args = args
        self.parts = Parts(args.work.resolve(), args.programs.resolve())
        self.folder = self.parts.work / "cluster"
        self.folder.mkdir(parents=True)
        isolation.private_mounts(self.folder)
        self.hosts = Hosts(self.parts, args.delay_ms, self.folder / "link.log")
        if not free_of_route(NODE_ADDRESS, KUBELET_PORT):
            raise Fault("the control plane reaches the node without a tunnel")
        self.control_plane = ControlPlane(self.parts, self.folder, self.hosts.control_plane)
        self.columns, self.results, self.node = {}, {}, None

    def start_node(self):
        """Starts the rest of the cluster, once kube-apiserver runs. The node dials out and so needs no tunnel."""
        self.control_plane.start_controllers()
        self.node = Node(self.parts, self.folder / "node", self.hosts, self.control_plane, self.args.inside)
        self.node.start_kubelet()
        pods.create(self.control_plane)
        if self.args.suite:
            suite.load_images(self.parts, self.node)

    def tunnels(self):
        """The tunnels to run, one after the other."""
        place = (self.parts, self.folder, self.hosts, self.control_plane)
        for system in self.args.system:
            yield from (Tunnel(system, frontend, *place) for frontend in FRONTENDS if frontend in self.args.frontend)
        if self.args.chart:
            yield ChartTunnel(*place, lambda: self.node)

    def use(self, tunnel):
        """Starts a tunnel and has kube-apiserver use it. No other runs meanwhile."""
        print(f"--- {tunnel.title}", flush=True)
        self.hosts.set_loss(0)
        tunnel.start()
        self.control_plane.start_apiserver(tunnel.egress_file())
        if self.node is None:
            self.start_node()
        tunnel.deploy()
        path = f"/api/v1/nodes/{NODE}/proxy/healthz"
        wait_for("kubelet is reached through the tunnel",
                 lambda: self.control_plane.kubectl("get", "--raw", path, check=False, timeout=20).stdout == "ok",
                 90, *tunnel.running())

    def measure(self, stage, check, column, work):
        """Runs a check and keeps its outcome."""
        started = time.monotonic()
        try:
            outcome = work()
            seconds, note = outcome or (time.monotonic() - started, "")
            result = table.Result(seconds, note=note)
        except Exception as fault:  # noqa: BLE001 (an unexpected answer is a failed check, and the run goes on)
            result = table.Result(time.monotonic() - started, fault=str(fault) or repr(fault))
        print(f"{stage}: {check}: {result.fault or result.cell()}", flush=True)
        self.results.setdefault(stage, {}).setdefault(check, {})[column] = result

    def run_column(self, tunnel):
        """All checks through one tunnel."""
        column = tunnel.name
        self.columns[column] = tunnel.title
        self.use(tunnel)
        lab = Lab(self.control_plane, self.folder, self.args.copy_mib)
        for loss in self.args.loss:
            self.hosts.set_loss(loss)
            for name in self.args.check:
                self.measure(f"{loss:g} % loss", name, column, lambda name=name: CHECKS[name](lab))
        if self.args.suite:
            self.run_suite(column)
        self.hosts.set_loss(0)
        for name in self.args.fault:
            self.measure("faults", name, column, lambda name=name: FAULTS[name](lab, tunnel, self.hosts))
        tunnel.stop()

    def run_suite(self, column):
        """The tests of Kubernetes, at the loss that is set."""
        folder = self.folder / "suite" / column
        for outcome in suite.run(self.parts, self.control_plane, self.args.suite, folder, SUITE_MINUTES):
            result = table.Result(outcome.seconds, outcome.fault)
            print(f"suite: {outcome.name}: {result.cell()}", flush=True)
            self.results.setdefault("suite", {}).setdefault(outcome.name, {})[column] = result

    def report(self):
        """The tables."""
        stages = {f"{loss:g} % loss": f"{loss:g} % loss each way" for loss in self.args.loss}
        stages |= {"faults": "While something fails or changes", "suite": "Tests of Kubernetes"}
        versions = ", ".join(f"{name} {version}" for name, version in self.parts.versions().items())
        return (f"Versions: {versions}. The link delays packets by {self.args.delay_ms:g} ms each way; `cp` moves "
                f"{self.args.copy_mib} MiB.\n\n"
                + table.markdown(self.results, self.columns, stages))

    def passed(self):
        """Whether every check of Culvert passed."""
        return not any(result.fault for checks in self.results.values() for columns in checks.values()
                       for column, result in columns.items() if not column.startswith("konnectivity"))


def run(args):
    """The part of a run that is in namespaces. Returns the exit code."""
    os.environ["no_proxy"] = "*"
    session = Session(args)
    if args.keep:
        tunnel = next(session.tunnels())
        session.use(tunnel)
        keep(session, tunnel)
        return 0
    for tunnel in session.tunnels():
        session.run_column(tunnel)
        if args.markdown:
            args.markdown.write_text(session.report())
    print(session.report())
    return 0 if session.passed() else 1


def keep(session, tunnel):
    """Leaves the cluster up until Ctrl-C."""
    work = session.parts.work
    shortcuts.write(work, session.control_plane.kubectl_command(), session.hosts.node_namespace)
    operator = "".join(
        f"  {session.parts.path(f'culvert-{side}')} {command} --socket={tunnel.operator_socket(side)}\n"
        for side, command in [("server", "agents"), ("agent", "status")] if tunnel.system == "culvert")
    print(f"""
The cluster is up. In another terminal, as root:

  {work}/kubectl get pods
  {work}/kubectl exec -it probe -- sh
  {work}/on-control-plane curl -s http://127.0.0.1:8134/metrics     in the network of the control plane
  {work}/on-node ip address                                         in the network of the node
{operator}
KUBECONFIG={session.control_plane.kubeconfigs['admin']} is for programs that {work}/on-control-plane starts.
Logs are in {session.control_plane.logs}. Commands to the link, one a line here, such as
{{"set": {{"each_way": {{"delay_ms": 10, "loss": 0.05}}}}}} or {{"udp": "drop"}}. Ctrl-C ends the cluster, and so does
kill {session.args.inside.rpartition("-")[2]}.
""", flush=True)
    while True:
        try:
            line = input()
            session.hosts.send(line)
            print("ok", flush=True)
        except Fault as fault:
            print(fault, flush=True)
        except EOFError:
            time.sleep(3600)
