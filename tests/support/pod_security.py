"""The Pod Security Standard `restricted`, as kubernetes.io/docs/concepts/security/pod-security-standards has it (1.37)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.support.manifests import Pod

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
PROFILES = ("RuntimeDefault", "Localhost")

Spec = Mapping[str, Any]


def violations(pod: Pod) -> list[str]:
    """What a namespace that enforces `restricted` would refuse the pod for."""
    found = list(_of_pod(pod.spec))
    for container in pod.containers:
        place = container["name"]
        found += [f"{place}: {problem}" for problem in _of_container(container, pod.spec)]
    return [f"{pod.owner}: {problem}" for problem in found]


def _of_pod(spec: Spec) -> Iterator[str]:
    context = spec.get("securityContext", {})
    yield from (f"{field} is on" for field in ("hostNetwork", "hostPID", "hostIPC") if spec.get(field))
    for volume in spec.get("volumes", []):
        if kinds := set(volume) - {"name"} - VOLUMES:
            yield f"volume {volume['name']} is of kind {', '.join(sorted(kinds))}"
    for sysctl in context.get("sysctls", []):
        if sysctl["name"] not in SYSCTLS:
            yield f"sysctl {sysctl['name']} is not safe"
    yield from _of_any_context(context)


def _of_container(container: Spec, pod: Spec) -> Iterator[str]:
    context, outer = container.get("securityContext", {}), pod.get("securityContext", {})
    if context.get("privileged"):
        yield "is privileged"
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("runAsNonRoot", outer.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    profile = context.get("seccompProfile", outer.get("seccompProfile", {})).get("type")
    if profile not in PROFILES:
        yield f"seccompProfile is {profile}"
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "does not drop all capabilities"
    if added := set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield f"adds {', '.join(sorted(added))}"
    if context.get("procMount", "Default") != "Default":
        yield "procMount is not Default"
    yield from (f"hostPort {port['hostPort']}" for port in container.get("ports", []) if port.get("hostPort"))
    yield from _of_any_context(context)
    yield from _hosts(container)


def _of_any_context(context: Spec) -> Iterator[str]:
    if context.get("runAsUser") == 0:
        yield "runs as user 0"
    if context.get("windowsOptions", {}).get("hostProcess"):
        yield "hostProcess is on"
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "appArmorProfile is Unconfined"
    if context.get("seccompProfile", {}).get("type", "RuntimeDefault") not in PROFILES:
        yield "seccompProfile is Unconfined"
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type", "") not in SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield "seLinuxOptions are not allowed"


def _hosts(container: Spec) -> Iterator[str]:
    """Probes and hooks that ask another machine."""
    lifecycle = container.get("lifecycle", {})
    handlers = [container.get(key, {}) for key in ("livenessProbe", "readinessProbe", "startupProbe")]
    for handler in [*handlers, *(lifecycle.get(key, {}) for key in ("preStop", "postStart"))]:
        if any(handler.get(kind, {}).get("host") for kind in ("httpGet", "tcpSocket")):
            yield "a probe or hook names a host"
