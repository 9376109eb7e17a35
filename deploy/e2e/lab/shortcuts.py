"""Scripts by which a person uses a cluster that is left up."""


def write(work, kubectl, node_namespace):
    """Writes the scripts to the folder. `lab.pid` there names the process whose namespaces they enter."""
    enter = f'exec nsenter --target "$(cat {work}/lab.pid)"'
    scripts = {
        "kubectl": f"{enter} --net -- {' '.join(kubectl)}",
        "on-control-plane": f"{enter} --net --",
        "on-node": f"{enter} --mount --pid -- nsenter --net={node_namespace} --",
    }
    for name, command in scripts.items():
        path = work / name
        path.write_text(f'#!/bin/sh\n{command} "$@"\n')
        path.chmod(0o755)
