"""The Pod Security Standard ``restricted``, as its admission would judge a pod's spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}  # fmt: skip
SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def violations(pod: dict[str, Any]) -> list[str]:
    """What is wrong, as "where: what"; empty for a pod that is let in."""
    shared = pod.get("securityContext") or {}
    found = [f"pod: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key)]
    found += [
        f"volume {volume['name']}: {kind}"
        for volume in pod.get("volumes") or []
        for kind in sorted(set(volume) - {"name"} - VOLUMES)
    ]
    found += [f"pod: sysctl {item['name']}" for item in shared.get("sysctls") or [] if item["name"] not in SYSCTLS]
    found += _of_context("pod", shared)
    for group in ("containers", "initContainers", "ephemeralContainers"):
        for container in pod.get(group) or []:
            found += _of_container(container, shared)
    return found


def pod_templates(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod template below a manifest, whatever kind it is."""
    if isinstance(node, dict):
        spec = node.get("spec")
        if isinstance(spec, dict) and isinstance(spec.get("containers"), list):
            yield node
        else:
            for value in node.values():
                yield from pod_templates(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_templates(value)


def _of_context(where: str, context: dict[str, Any]) -> list[str]:
    found = []
    if context.get("runAsUser") == 0:
        found.append(f"{where}: runAsUser 0")
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        found.append(f"{where}: hostProcess")
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        found.append(f"{where}: seLinuxOptions")
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        found.append(f"{where}: appArmorProfile")
    return found


def _of_container(container: dict[str, Any], shared: dict[str, Any]) -> list[str]:
    own, where = container.get("securityContext") or {}, container["name"]
    capabilities = own.get("capabilities") or {}
    found = _of_context(where, own)
    if own.get("privileged"):
        found.append(f"{where}: privileged")
    if own.get("allowPrivilegeEscalation") is not False:
        found.append(f"{where}: allowPrivilegeEscalation")
    if "ALL" not in (capabilities.get("drop") or []):
        found.append(f"{where}: capabilities are not dropped")
    if set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        found.append(f"{where}: capabilities {capabilities['add']} added")
    if own.get("procMount", "Default") != "Default":
        found.append(f"{where}: procMount")
    if own.get("runAsNonRoot", shared.get("runAsNonRoot")) is not True:
        found.append(f"{where}: runAsNonRoot")
    profile = own.get("seccompProfile") or shared.get("seccompProfile") or {}
    if profile.get("type") not in ("RuntimeDefault", "Localhost"):
        found.append(f"{where}: seccompProfile")
    if any(port.get("hostPort") for port in container.get("ports") or []):
        found.append(f"{where}: hostPort")
    return found
