"""Test hosts: real Debian systems with their own systemd, sshd and network, booted in about a second.

roots.py makes and caches the base file systems, network.py the bridge and namespaces, hosts.py boots,
reaches, powers off and removes a host. None of these knows halo; the test modules do.
"""
