"""A Kubernetes cluster on one machine, whose control plane reaches its node through a tunnel alone."""
