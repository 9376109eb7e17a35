"""Tests of Kubernetes itself (`k8s.io/kubernetes/test/e2e`), those whose bytes cross the tunnel."""

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from . import image
from .fault import Fault
from .parts import HERE, module_folder
from .processes import Process

REGISTRY = "registry.k8s.io"
FOCUS = "|".join([
    "Kubectl Port forwarding", "Kubectl logs", "Simple pod", "websockets", "AdmissionWebhook", "Proxy version v1",
    "CustomResourceConversionWebhook", "Ephemeral Containers", "kubectl debug", "Kubectl copy", "Kubectl exec",
])
SKIP = "|".join([r"\[Slow\]", r"\[Disruptive\]", r"\[Serial\]", r"\[Flaky\]", r"\[Feature:",
                 # Needs kube-proxy.
                 "should handle in-cluster config"])


@dataclass
class Outcome:
    """Outcome of one test."""

    name: str
    seconds: float
    fault: str


def load_images(parts, node):
    """Makes the images of the tests from Kubernetes' own sources and BusyBox, under the names that the tests use. What
    they have in nginx is not used: a container that sleeps does instead."""
    sources = Path(module_folder(HERE / "kubernetes", "k8s.io/kubernetes")) / "test/images/agnhost/porter"
    layer = image.layer_of(parts, {"agnhost": parts.path("agnhost"), "localhost.crt": sources / "localhost.crt",
                                   "localhost.key": sources / "localhost.key"})
    archive = node.folder / "suite.tar"
    agnhost = {"Entrypoint": ["/agnhost"], "Cmd": ["pause"], "WorkingDir": "/"}
    settings = {"e2e-test-images/agnhost": agnhost, "e2e-test-images/busybox": {"Cmd": ["/bin/sh"], "WorkingDir": "/"},
                "e2e-test-images/nginx": {"Cmd": image.COMMAND}, "pause": {"Cmd": image.COMMAND}}
    images = {name: settings[short] for short in settings for name in names(parts, short)}
    image.pack(archive, layer, images)
    node.load(archive)


def names(parts, short):
    """Names of an image's versions in the tests."""
    listed = subprocess.run([parts.path("e2e.test"), "--list-images"], capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split() if name.startswith(f"{REGISTRY}/{short}:")]


def run(parts, control_plane, focus, folder, minutes):
    """Runs the tests. Returns their outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "e2e.log"
    suite = Process("e2e.test", [
        parts.path("e2e.test"), f"--kubeconfig={control_plane.kubeconfigs['admin']}", "--provider=skeleton",
        f"--kubectl-path={parts.path('kubectl')}", f"--report-dir={folder}", f"--ginkgo.focus={focus}",
        f"--ginkgo.skip={SKIP}", "--ginkgo.no-color", f"--ginkgo.timeout={minutes}m", "--num-nodes=1"],
        log, env=os.environ | {"KUBECACHEDIR": str(folder / "cache"), "TMPDIR": str(folder)}, cwd=folder)
    try:
        suite.child.wait(minutes * 60 + 60)
    except subprocess.TimeoutExpired:
        suite.stop()
    reports = list(folder.glob("junit*.xml"))
    if not reports:
        raise Fault(f"e2e.test wrote no report:\n{suite.tail()}")
    return [outcome for report in reports for outcome in outcomes(report)]


def outcomes(report):
    """Outcomes in a JUnit report, without the tests that were not chosen."""
    for case in ElementTree.parse(report).iter("testcase"):
        fault = case.find("failure")
        if case.find("skipped") is None and case.get("name", "").startswith("[It]"):
            name = case.get("name").removeprefix("[It] ")
            text = "" if fault is None else f"{fault.get('message', '')} {fault.text or ''}".strip()
            yield Outcome(name, float(case.get("time", 0)), text or ("failed" if fault is not None else ""))
