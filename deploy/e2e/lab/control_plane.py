"""etcd, kube-apiserver, kube-controller-manager and kube-scheduler, in the control plane's network namespace."""

import subprocess

from . import certificates
from .fault import Fault
from .hosts import NODE_ADDRESS
from .processes import Process, wait_for

NODE = "node-1"
SERVICES = "10.96.0.0/16"
APISERVER_PORT = 6443


class ControlPlane:
    """The control plane of the cluster. kube-apiserver starts with an egress selector and is replaced for another."""

    def __init__(self, parts, folder, address):
        self.parts, self.folder, self.address = parts, folder, address
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.apiserver = None
        self.make_certificates()
        self.etcd = self.run("etcd", [
            "--data-dir", folder / "etcd", "--unsafe-no-fsync", "--listen-client-urls", "http://127.0.0.1:2379",
            "--advertise-client-urls", "http://127.0.0.1:2379", "--listen-peer-urls", "http://127.0.0.1:2380",
            "--initial-advertise-peer-urls", "http://127.0.0.1:2380", "--initial-cluster",
            "default=http://127.0.0.1:2380", "--log-level", "warn"])

    def make_certificates(self):
        """Makes all certificates and kubeconfigs, as kubeadm does."""
        pki = self.folder / "pki"
        self.ca = ca = certificates.Authority(pki, "ca")
        self.front_proxy = certificates.Authority(pki, "front-proxy-ca")
        self.serving = self.issue_serving()
        self.kubelet_client = ca.issue("apiserver-kubelet-client", "kube-apiserver-kubelet-client", "system:masters")
        self.aggregator = self.front_proxy.issue("front-proxy-client", "front-proxy-client")
        self.kubelet_serving = ca.issue("kubelet", f"system:node:{NODE}", "system:nodes",
                                        [f"DNS:{NODE}", f"IP:{NODE_ADDRESS}"])
        self.token_keys = certificates.key_pair(pki, "sa")
        users = {
            "admin": ("kubernetes-admin", "system:masters", "127.0.0.1"),
            "controller-manager": ("system:kube-controller-manager", "", "127.0.0.1"),
            "scheduler": ("system:kube-scheduler", "", "127.0.0.1"),
            "konnectivity-server": ("system:konnectivity-server", "", "127.0.0.1"),
            "kubelet": (f"system:node:{NODE}", "system:nodes", self.address),
        }
        self.kubeconfigs = {}
        for user, (name, group, host) in users.items():
            pair = ca.issue(f"user-{user}", name, group)
            self.kubeconfigs[user] = certificates.kubeconfig(
                pki / f"{user}.conf", f"https://{host}:{APISERVER_PORT}", ca.cert, *pair)

    def issue_serving(self):
        """Issues kube-apiserver's certificate, or a new one in its place. It reads the files again by itself."""
        names = ["DNS:kubernetes", "DNS:kubernetes.default.svc", "DNS:localhost", "IP:127.0.0.1", "IP:10.96.0.1",
                 f"IP:{self.address}"]
        return self.ca.issue("apiserver", "kube-apiserver", names=names)

    def run(self, name, arguments):
        """Starts a program of the control plane."""
        return Process(name, [self.parts.path(name), *arguments], self.logs / f"{name}.log")

    def start_apiserver(self, egress_file):
        """Starts kube-apiserver with this egress selector, in place of the one that runs."""
        if self.apiserver:
            self.apiserver.stop()
        pki = self.folder / "pki"
        arguments = [
            "--etcd-servers=http://127.0.0.1:2379", f"--secure-port={APISERVER_PORT}",
            f"--advertise-address={self.address}", f"--egress-selector-config-file={egress_file}",
            f"--tls-cert-file={self.serving[0]}", f"--tls-private-key-file={self.serving[1]}",
            f"--client-ca-file={self.ca.cert}",
            f"--kubelet-client-certificate={self.kubelet_client[0]}",
            f"--kubelet-client-key={self.kubelet_client[1]}", f"--kubelet-certificate-authority={self.ca.cert}",
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self.token_keys[1]}",
            f"--service-account-signing-key-file={self.token_keys[0]}", f"--service-cluster-ip-range={SERVICES}",
            f"--requestheader-client-ca-file={self.front_proxy.cert}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User", f"--proxy-client-cert-file={self.aggregator[0]}",
            f"--proxy-client-key-file={self.aggregator[1]}",
            # There is no kube-proxy: Services are reached by the addresses of their pods.
            "--enable-aggregator-routing=true",
            "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
            f"--cert-dir={pki}", "--v=1",
        ]
        self.apiserver = self.run("kube-apiserver", arguments)
        wait_for("kube-apiserver is ready", self.is_ready, 120, self.etcd, self.apiserver)

    def is_ready(self):
        """Whether kube-apiserver is ready, all but the aggregated API, which needs a tunnel."""
        return self.kubectl("get", "--raw", "/readyz?exclude=poststarthook/apiservice-discovery-controller",
                            check=False).returncode == 0

    def start_controllers(self):
        """Starts kube-controller-manager and kube-scheduler. They outlast the apiserver's restarts."""
        config = self.kubeconfigs
        self.run("kube-controller-manager", [
            f"--kubeconfig={config['controller-manager']}", f"--root-ca-file={self.ca.cert}",
            f"--service-account-private-key-file={self.token_keys[0]}", "--use-service-account-credentials",
            "--leader-elect=false", "--bind-address=127.0.0.1", f"--cert-dir={self.folder / 'pki'}", "--v=1"])
        self.run("kube-scheduler", [
            f"--kubeconfig={config['scheduler']}", "--leader-elect=false", "--bind-address=127.0.0.1",
            f"--cert-dir={self.folder / 'pki'}", "--v=1"])

    def kubectl_command(self, *arguments):
        """The command of kubectl as administrator."""
        return [str(self.parts.path("kubectl")), f"--kubeconfig={self.kubeconfigs['admin']}",
                f"--cache-dir={self.folder / 'kubectl'}", *map(str, arguments)]

    def kubectl(self, *arguments, check=True, timeout=60, text=True, **options):
        """Runs kubectl. Raises a fault when it fails, unless `check` is false."""
        try:
            done = subprocess.run(self.kubectl_command(*arguments), capture_output=True, text=text, timeout=timeout,
                                  check=False, **options)
        except subprocess.TimeoutExpired as error:
            raise Fault(f"kubectl {' '.join(map(str, arguments))}: no end within {timeout} s") from error
        if check and done.returncode != 0:
            words = done.stderr if text else done.stderr.decode(errors="replace")
            raise Fault(f"kubectl {' '.join(map(str, arguments))}: {words.strip()}")
        return done
