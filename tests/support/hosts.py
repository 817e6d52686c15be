"""Hosts for tests of several nodes: network namespaces on this machine, joined by a switch.

The hosts share file systems, cores and clock. Each host has its own network, interfaces, host name and /etc/hosts.
They need Linux, root and the `ip` and `tc` commands of iproute2.
"""

import os
import signal
import subprocess
from pathlib import Path

import psutil

NETWORK = "10.93.0"


def run(*command):
    """Run a command and return its stdout; if it fails, fail the test with its stderr."""
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr.strip()}; these tests need root and iproute2"
    return result.stdout


class Hosts:
    """`Hosts("host-a", "host-b")`; `close` kills the processes on the hosts and removes the hosts."""

    def __init__(self, *names):
        self.names = names
        self.processes = []
        self.switch = self.space("switch")
        try:
            run("ip", "netns", "add", self.switch)
            run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", self.switch, "link", "set", "bridge", "up")
            host_lines = "".join(f"{NETWORK}.{number} {name}\n" for number, name in enumerate(names, start=1))
            for number, name in enumerate(names, start=1):
                space = self.space(name)
                run("ip", "netns", "add", space)
                etc = Path("/etc/netns") / space
                etc.mkdir(parents=True)
                (etc / "hosts").write_text(f"127.0.0.1 localhost\n{host_lines}")
                peer = ("type", "veth", "peer", "name", "eth0", "netns", space)
                run("ip", "-n", self.switch, "link", "add", name, *peer)
                run("ip", "-n", self.switch, "link", "set", name, "master", "bridge", "up")
                run("ip", "-n", space, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
                run("ip", "-n", space, "link", "set", "lo", "up")
                run("ip", "-n", space, "link", "set", "eth0", "up")
        except BaseException:
            self.close()
            raise

    def space(self, name):
        """Return the network namespace of a host."""
        return f"moonlight-{os.getpid()}-{name}"

    def start(self, name, command, log, **options):
        """Start a command on a host, with its output in the file `log`."""
        set_hostname = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        with Path(log).open("a") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.space(name), *set_hostname, *map(str, command)],
                stdout=out,
                stderr=subprocess.STDOUT,
                **options,
            )
        self.processes.append(process)
        return process

    def processes_of(self, name):
        """Return all processes of a host."""
        return [psutil.Process(int(pid)) for pid in run("ip", "netns", "pids", self.space(name)).split()]

    def cut(self, name):
        """Disconnect a host from the network."""
        run("ip", "-n", self.switch, "link", "set", name, "down")

    def mend(self, name):
        """Reconnect a host to the network."""
        run("ip", "-n", self.switch, "link", "set", name, "up")

    def limit(self, name, megabits):
        """Limit the rate at which a host sends."""
        shaper = ("tbf", "rate", f"{megabits}mbit", "burst", "256kb", "latency", "500ms")
        run("tc", "-n", self.space(name), "qdisc", "add", "dev", "eth0", "root", *shaper)

    def close(self):
        for name in self.names:
            listed = subprocess.run(["ip", "netns", "pids", self.space(name)], capture_output=True, text=True)
            for pid in listed.stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self.space(name)], capture_output=True)
            etc = Path("/etc/netns") / self.space(name)
            (etc / "hosts").unlink(missing_ok=True)
            if etc.exists():
                etc.rmdir()
        for process in self.processes:
            process.wait()
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True)
