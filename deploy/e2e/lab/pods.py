"""The pods that the checks use, with the webhook and the aggregated API."""

import base64
import json

from . import image
from .processes import wait_for

GROUP = "lab.culvert.dev"
HOOKED = "hooked"
WEB_BYTES = 1 << 20


def pod(name, command, port=None, volumes=(), **container):
    """A pod on the node."""
    ports = [{"containerPort": port}] if port else []
    mounts = [{"name": volume["name"], "mountPath": "/" + volume["name"]} for volume in volumes]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": {
        "terminationGracePeriodSeconds": 0, "enableServiceLinks": False, "volumes": list(volumes),
        "containers": [{"name": name, "image": image.NAME, "imagePullPolicy": "Never", "command": command,
                        "ports": ports, "volumeMounts": mounts, **container}]}}


def objects():
    """All objects but the registrations of webhook and API."""
    shell = lambda script: ["/bin/sh", "-c", script]  # noqa: E731
    secret = {"name": "tls", "secret": {"secretName": "services"}}
    web = f"mkdir /tmp/www && head -c {WEB_BYTES} /dev/urandom >/tmp/www/data && exec httpd -f -p 8080 -h /tmp/www"
    return [
        pod("probe", ["/bin/sleep", "2147483647"]),
        pod("echo", shell("while read line; do echo got:$line; done"), stdin=True),
        pod("ticker", shell("i=0; while true; do i=$((i+1)); echo tick $i; usleep 100000; done")),
        pod("web", shell(web), 8080),
        pod("services", ["/services", ":8443", "/tls/tls.crt", "/tls/tls.key"], 8443, [secret]),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "services"},
         "spec": {"selector": {"app": "services"}, "ports": [{"port": 443, "targetPort": 8443}]}},
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": HOOKED, "labels": {"hooked": "yes"}}},
    ]


def registrations(bundle):
    """The webhooks for one namespace, and the aggregated API."""
    def hook(kind, path):
        return {"apiVersion": "admissionregistration.k8s.io/v1", "kind": f"{kind}WebhookConfiguration",
                "metadata": {"name": "lab"}, "webhooks": [{
                    "name": f"{path}.{GROUP}", "admissionReviewVersions": ["v1"], "sideEffects": "None",
                    "failurePolicy": "Fail", "timeoutSeconds": 10,
                    "namespaceSelector": {"matchLabels": {"hooked": "yes"}},
                    "clientConfig": {"caBundle": bundle, "service": {
                        "namespace": "default", "name": "services", "path": f"/{path}", "port": 443}},
                    "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"],
                               "resources": ["configmaps"]}]}]}
    return [
        hook("Mutating", "mutate"), hook("Validating", "validate"),
        {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": f"v1.{GROUP}"},
         "spec": {"group": GROUP, "version": "v1", "groupPriorityMinimum": 100, "versionPriority": 100,
                  "caBundle": bundle, "service": {"namespace": "default", "name": "services", "port": 443}}},
    ]


def create(control_plane):
    """Creates everything, and waits until the pods run. That needs no tunnel."""
    cert, key = control_plane.ca.issue("services", "services", names=["DNS:services.default.svc"])
    control_plane.kubectl("create", "secret", "tls", "services", f"--cert={cert}", f"--key={key}")
    account = lambda: control_plane.kubectl("get", "serviceaccount", "default", check=False)  # noqa: E731
    wait_for("the default service account is there", lambda: account().returncode == 0, 60)
    bundle = base64.b64encode(control_plane.ca.cert.read_bytes()).decode()
    items = objects() + registrations(bundle)
    control_plane.kubectl("apply", "-f", "-", input=json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    control_plane.kubectl("wait", "pods", "--all", "--for=condition=Ready", "--timeout=120s", timeout=130)
