"""A machine that lets no ordinary user make namespaces, as Ubuntu's AppArmor does by default."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import box, hosts, roots
from tests.hosts.box import USER
from tests.hosts.network import Bridge

pytestmark = pytest.mark.hosts

# The user's manager and all that it starts inherit a filter under which a user namespace cannot be made.
DENY = "mkdir -p /etc/systemd/system/user@.service.d && printf '[Service]\\nRestrictNamespaces=~user\\n'"


def test_a_user_without_namespaces_gets_a_server_all_the_same(bridge: Bridge, bundle: Path) -> None:
    """The whole sandbox cannot start there; no server at all would be the worse answer."""
    with hosts.launch(bridge, roots.root(roots.BOOKWORM), users=["ada"]) as host:
        host.run(f"{DENY} > /etc/systemd/system/user@.service.d/deny.conf && systemctl daemon-reload")
        host.run("loginctl enable-linger ada && systemctl restart user@$(id -u ada).service")
        assert host.run("unshare --user true", user="ada", check=False).code == 0, "only the manager is held"
        box.carry_bundle(host, bundle, "ada")
        done = box.install_from_bundle(host, "--scope", "user", user="ada", check=False)
        assert done.code == 0, f"{done}{host.run('journalctl -n 40 --no-pager', check=False).out}"
        assert "lets no user make namespaces" in done.out
        assert box.has_words(box.completion(host, USER))
        assert host.run(USER.halo("doctor"), user="ada", check=False).code == 0
        again = box.install_from_bundle(host, "--scope", "user", user="ada")
        assert "no change" in again.out
