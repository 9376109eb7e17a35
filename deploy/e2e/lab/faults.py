"""What happens while the link or a process fails, or certificates change."""

import signal
import socket
import ssl
import subprocess
import threading
import time

from .checks import expect, read_until
from .fault import Fault
from .tunnels import AGENT_PORT

RECOVERY = 90  # seconds until exec has to succeed again
ATTEMPT = 15  # seconds of one attempt
STALL = 20  # seconds without output after which a stream counts as cut
ROTATION = 150  # seconds until a new certificate has to be presented
ENDLESS = "i=0; while true; do echo $i; i=$((i+1)); usleep 100000; done"


class OpenStream:
    """A `kubectl exec` whose output goes on and on."""

    def __init__(self, lab):
        self.process = lab.interactive("exec", "probe", "--", "sh", "-c", ENDLESS)
        read_until(self.process.stdout.fileno(), b"3\n")

    def flows(self):
        """Whether output still comes, and not only what was on its way."""
        end = time.monotonic() + 1
        try:
            while time.monotonic() < end:
                read_until(self.process.stdout.fileno(), b"\n", seconds=STALL)
        except Fault:
            return False
        return True

    def ended_within(self, seconds):
        """Seconds until kubectl has ended, or None."""
        started = time.monotonic()
        try:
            self.process.communicate(timeout=seconds)
            return time.monotonic() - started
        except subprocess.TimeoutExpired:
            return None

    def close(self):
        """Ends it."""
        self.process.kill()
        self.process.communicate()


def recover(lab):
    """Tries `kubectl exec` until it succeeds. Returns how many attempts failed."""
    end, failed = time.monotonic() + RECOVERY, 0
    while True:
        try:
            done = lab.kubectl("exec", "probe", "--", "echo", "back", check=False, timeout=ATTEMPT)
            if done.stdout == "back\n":
                return failed
        except Fault as fault:
            done = fault
        failed += 1
        expect(time.monotonic() < end, f"no exec succeeded within {RECOVERY} s: {done}")
        time.sleep(0.2)


def during(lab, change):
    """Tries `kubectl exec` again and again while a process is replaced. Returns the longest time between two successes,
    in which exec was not to be had, and how many attempts failed."""
    changing = threading.Thread(target=change)
    last, longest, failed = time.monotonic(), 0, 0
    changing.start()
    while True:
        over = not changing.is_alive()
        failed += recover(lab)
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
        if over:
            return longest, failed


def attempts(failed):
    """How many attempts failed, in words."""
    return f"{failed} attempts failed" if failed != 1 else "1 attempt failed"


def udp_vanishes(lab, tunnel, hosts):
    """UDP packets are lost from now on: until exec works over another carrier, and what open streams do."""
    stream = OpenStream(lab)
    hosts.set_udp("drop")
    try:
        started = time.monotonic()
        failed = recover(lab)
        seconds = time.monotonic() - started
        kept = stream.flows()
        for _ in range(3):
            expect(recover(lab) == 0, "exec fails again after it had succeeded")
        return seconds, f"{attempts(failed)}, open stream {'continued' if kept else 'was cut'}"
    finally:
        hosts.set_udp("pass")
        stream.close()


def link_is_down(lab, tunnel, hosts):
    """No packet passes for ten seconds: until exec works after that, and what open streams do."""
    stream = OpenStream(lab)
    try:
        hosts.command("down")
        time.sleep(10)
        hosts.command("up")
        started = time.monotonic()
        failed = recover(lab)
        seconds = time.monotonic() - started
        kept = stream.flows()
        return seconds, f"{attempts(failed)}, open stream {'continued' if kept else 'was cut'}"
    finally:
        hosts.command("up")
        stream.close()


def agent_restarts(lab, tunnel, hosts):
    """The agent is stopped by SIGTERM, as by kubelet, with a stream open, and starts again: how long exec is not to be
    had meanwhile."""
    stream = OpenStream(lab)
    try:
        longest, failed = during(lab, lambda: tunnel.restart_agent(signal.SIGTERM))
        return longest, attempts(failed)
    finally:
        stream.close()


def without_agent(lab, tunnel, hosts):
    """No agent runs: exec has to fail, since there is no other route to the node. Until it fails."""
    tunnel.stop_agent()
    try:
        started = time.monotonic()
        done = lab.kubectl("exec", "probe", "--", "echo", "out", check=False, timeout=RECOVERY)
        seconds = time.monotonic() - started
        expect(done.returncode != 0 and "out" not in done.stdout, "exec succeeded")
    finally:
        tunnel.start_agent()
        recover(lab)
    return seconds, "an error, as it should be"


def agent_is_killed(lab, tunnel, hosts):
    """The agent is killed with a stream open: the stream has to end. Until exec works with the new agent."""
    stream = OpenStream(lab)
    try:
        started = time.monotonic()
        tunnel.restart_agent(signal.SIGKILL)
        failed = recover(lab)
        seconds = time.monotonic() - started
        ended = stream.ended_within(60)
        expect(ended is not None, "kubectl on the open stream did not end within 60 s")
        return seconds, f"{attempts(failed)}, open stream ended"
    finally:
        stream.close()


def server_restarts(lab, tunnel, hosts):
    """The server is stopped by SIGTERM and starts again: how long exec is not to be had meanwhile."""
    longest, failed = during(lab, tunnel.restart_server)
    return longest, attempts(failed)


def certificates_rotate(lab, tunnel, hosts):
    """Both sides get new certificates in place of the old files: until the server presents the new one."""
    old = presented(tunnel)
    started = time.monotonic()
    tunnel.issue_certificates()
    while presented(tunnel) == old:
        expect(time.monotonic() - started < ROTATION, f"the old certificate is presented after {ROTATION} s")
        time.sleep(1)
    seconds = time.monotonic() - started
    expect(recover(lab) == 0, "exec fails with the new certificate")
    # A new agent connects with its new certificate to a server that was not restarted.
    tunnel.restart_agent(signal.SIGKILL)
    recover(lab)
    return seconds, ""


def presented(tunnel):
    """The certificate that the server presents over TCP."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(*map(str, tunnel.agent_pair))
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((tunnel.address, AGENT_PORT), timeout=5) as plain:
        with context.wrap_socket(plain) as secured:
            return secured.getpeercert(binary_form=True)


FAULTS = {
    "UDP vanishes": udp_vanishes,
    "link down for 10 s": link_is_down,
    "no agent": without_agent,
    "agent restarts": agent_restarts,
    "agent is killed": agent_is_killed,
    "server restarts": server_restarts,
    "certificates rotate": certificates_rotate,
}
