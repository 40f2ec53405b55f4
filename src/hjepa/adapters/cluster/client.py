"""The Kubernetes API, as much of it as following a training job takes: patient with the server, plain in its errors.

Objects are the dictionaries that the API sends. The ``kubernetes`` package finds the server and the credentials; the
requests go over its connection pool, so that every version of it behaves alike.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from hjepa.errors import HjepaError, UserError
from hjepa.utils.logging import warn

Object = dict[str, Any]

BUDGET_SECONDS = 600.0  # how long the API server may be out of reach
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 30.0
_LONGEST_PAUSE_SECONDS = 30.0
_POD_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ROLE = "manifests/base/launcher-role.yaml"  # what an administrator applies to grant what is missing


class Api(NamedTuple):
    """One resource of the API."""

    group: str
    version: str
    plural: str

    def path(self, namespace: str, name: str = "", subresource: str = "") -> str:
        root = f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"
        parts = [root, "namespaces", quote(namespace, safe=""), self.plural]
        return "/".join([*parts, *(quote(part, safe="") for part in (name, subresource) if part)])


PODS = Api("", "v1", "pods")
EVENTS = Api("", "v1", "events")
WORKFLOWS = Api("argoproj.io", "v1alpha1", "workflows")


class ApiError(HjepaError):
    """The server's refusal of one request, in its own words."""

    def __init__(self, status: int, reason: str, message: str):
        super().__init__(message)
        self.status, self.reason = status, reason


class AccessError(UserError):
    """These credentials may not do this (403), or are none (401)."""


class StreamLostError(HjepaError):
    """A watch or a log broke off; what it follows goes on."""


class Cluster:
    """One namespace of a cluster.

    Overload, outages and expired tokens are waited out with growing pauses, at most ``budget_seconds`` for one request.

    Args:
        namespace: By default the pod's own, or the one of the kubeconfig's context.
        patience: Called before each pause with its seconds; by default it sleeps.

    Raises:
        UserError: the package is not installed, or no cluster is configured.
    """

    def __init__(
        self,
        namespace: str | None = None,
        *,
        budget_seconds: float = BUDGET_SECONDS,
        patience: Callable[[float], None] = time.sleep,
    ):
        self._asked_namespace = namespace
        self.patience = patience
        self.budget_seconds = budget_seconds
        self.reload()

    def another(self) -> Cluster:
        """The same with connections of its own, for a thread that must not wait for a free one."""
        return Cluster(self.namespace, budget_seconds=self.budget_seconds)

    def reload(self) -> None:
        """Read the configuration anew: a token does not live for ever."""
        try:
            from kubernetes import client, config
            from kubernetes.config import ConfigException
        except ImportError as error:
            raise UserError(
                "training as a job of a cluster needs the package kubernetes: pip install 'hjepa[cluster]'"
            ) from error
        configuration = client.Configuration()
        kubeconfig = os.environ.get("KUBECONFIG")
        in_pod = kubeconfig is None and (_POD_FOLDER / "token").exists() and "KUBERNETES_SERVICE_HOST" in os.environ
        try:
            if in_pod:
                config.load_incluster_config(client_configuration=configuration)
                here = (_POD_FOLDER / "namespace").read_text("utf-8").strip()
            else:
                config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
                _, context = config.list_kube_config_contexts(config_file=kubeconfig)
                here = context["context"].get("namespace", "default")
        except ConfigException as error:
            raise UserError(
                f"no cluster: {error}. Expected to run in a pod with a service account, or a kubeconfig in "
                "~/.kube/config or where KUBECONFIG says; cluster.backend=local trains on this machine"
            ) from error
        self.namespace: str = self._asked_namespace or here
        self.host: str = configuration.host.rstrip("/")
        self._configuration = configuration
        self._pool = client.ApiClient(configuration).rest_client.pool_manager

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        for setting in self._configuration.auth_settings().values():
            if setting.get("in") == "header" and setting.get("value"):
                headers[setting["key"]] = setting["value"]
        return headers

    # -- requests -----------------------------------------------------------------------------------------------------

    def once(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        content: str = "application/json",
        seconds: float = _ANSWER_SECONDS,
        stream: bool = False,
    ) -> Any:
        """One request, one try. ``stream`` returns urllib3's response, unread; otherwise the parsed JSON.

        Raises:
            ApiError: the server refused.
            OSError, urllib3.exceptions.HTTPError: no answer.
        """
        import urllib3

        address = self.host + path + (f"?{urlencode(query)}" if query else "")
        headers = self._headers()
        if body is not None:
            headers["Content-Type"] = content
        response = self._pool.request(
            method,
            address,
            body=None if body is None else json.dumps(body).encode(),
            headers=headers,
            timeout=urllib3.Timeout(connect=min(_CONNECT_SECONDS, seconds), read=seconds),
            retries=False,
            preload_content=not stream,
        )
        if response.status >= 400:
            text = response.data.decode("utf-8", "replace")
            try:
                status = json.loads(text)
            except ValueError:
                status = {}
            if not isinstance(status, dict):
                status = {}
            error = ApiError(response.status, status.get("reason", ""), status.get("message") or text or "no message")
            error.retry_after = response.headers.get("Retry-After")  # type: ignore[attr-defined]
            raise error
        return response if stream else json.loads(response.data)

    def request(self, method: str, path: str, *, doing: str, **options: Any) -> Any:
        """``once``, repeated while the fault is the server's or the way to it.

        Args:
            doing: "create pytorchjobs.kubeflow.org", for the error of a missing right.

        Raises:
            AccessError: not allowed, or not known.
            ApiError: refused for another reason.
            HjepaError: no answer within the budget.
        """
        import urllib3

        end = time.monotonic() + self.budget_seconds
        refused = tries = 0
        while True:
            pause = min(_LONGEST_PAUSE_SECONDS, 0.25 * 2**tries) * random.uniform(0.7, 1.3)
            try:
                return self.once(method, path, **options)
            except ApiError as error:
                if error.status == 401 and refused < 3:
                    refused += 1  # a token of a pod lives an hour; the file has the new one
                    self.reload()
                elif error.status in (401, 403):
                    raise self._no_access(error, doing) from error
                elif error.status != 429 and error.status < 500:
                    raise
                wait = getattr(error, "retry_after", None)
                if wait is not None and wait.isdigit():
                    pause = max(pause, float(wait))
                problem = f"{error.status} {error}"
            except (OSError, urllib3.exceptions.HTTPError) as error:
                problem = f"{type(error).__name__}: {error}"
            tries += 1
            if time.monotonic() + pause > end:
                raise HjepaError(
                    f"the Kubernetes API at {self.host} gave no answer to '{doing}' for {self.budget_seconds:.0f} s: "
                    f"{problem}. What runs in the cluster goes on; run this step again to follow it"
                )
            if tries == 4:
                warn(f"the Kubernetes API gives no answer ({problem}); trying for {self.budget_seconds:.0f} s")
            self.patience(pause)

    def _no_access(self, error: ApiError, doing: str) -> HjepaError:
        if error.status == 401:
            return AccessError(
                f"the Kubernetes API at {self.host} does not accept these credentials ('{doing}': {error}); "
                "check the kubeconfig, or the pod's service account"
            )
        if "cannot" not in str(error):  # an admission webhook, a quota, Pod Security: no right would help
            return ApiError(403, error.reason, str(error))
        return AccessError(
            f"not allowed in namespace {self.namespace}: {doing}. Its Role needs this verb; {ROLE} holds all that are "
            f"used, bound to the step's service account. The server says: {error}"
        )

    # -- objects ------------------------------------------------------------------------------------------------------

    def create(self, api: Api, manifest: Object) -> Object:
        """Raises ApiError 409 if it exists. Read-after-lost-answer is the caller's: it may exist because of this call.

        Raises:
            UserError: refused: not valid, not allowed, or the cluster does not know such objects.
        """
        name = manifest["metadata"]["name"]
        doing = f"create {_named(api)}"
        try:
            made: Object = self.request(
                "POST", api.path(self.namespace), doing=doing, body=manifest, query={"fieldValidation": "Strict"}
            )
        except ApiError as error:
            if error.status == 409:
                raise
            if error.status == 404 and "namespaces" in str(error):
                raise UserError(
                    f"there is no namespace {self.namespace}; create it or change cluster.namespace"
                ) from error
            if error.status == 404:
                raise UserError(
                    f"this cluster has no {_named(api)}: their operator is not installed. It has "
                    f"{', '.join(sorted(self.training_groups())) or 'no training operator at all'}; change "
                    "cluster.backend, or ask the cluster's administrator to install it"
                ) from error
            raise UserError(f"the cluster refuses {manifest['kind']} {name}: {error}") from error
        return made

    def get(self, api: Api, name: str) -> Object | None:
        try:
            found: Object = self.request("GET", api.path(self.namespace, name), doing=f"get {_named(api)}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found

    def list(self, api: Api, *, labels: str = "", fields: str = "") -> list[Object]:
        query = {key: text for key, text in (("labelSelector", labels), ("fieldSelector", fields)) if text}
        found = self.request("GET", api.path(self.namespace), doing=f"list {_named(api)}", query=query)
        items: list[Object] = found["items"]
        return items

    def patch(self, api: Api, name: str, patch: Object) -> Object:
        patched: Object = self.request(
            "PATCH",
            api.path(self.namespace, name),
            doing=f"patch {_named(api)}",
            body=patch,
            content="application/merge-patch+json",
        )
        return patched

    def delete(self, api: Api, name: str, *, uid: str | None = None, foreground: bool = False) -> bool:
        """Whether there was something to delete: with ``uid``, this very object.

        Args:
            foreground: The object stays until its pods are gone.
        """
        body: Object = {"propagationPolicy": "Foreground" if foreground else "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            self.request("DELETE", api.path(self.namespace, name), doing=f"delete {_named(api)}", body=body)
        except ApiError as error:
            if error.status in (404, 409):
                return False
            raise
        return True

    # -- streams ------------------------------------------------------------------------------------------------------

    def watch(self, api: Api, name: str, version: str, seconds: float) -> Iterator[tuple[str, Object]]:
        """(ADDED, MODIFIED or DELETED, object) of one object until ``seconds`` are over.

        Raises:
            StreamLostError: it broke off, or ``version`` is too old; get the object again.
            AccessError: not allowed.
        """
        query = {
            "watch": "true",
            "fieldSelector": f"metadata.name={name}",
            "resourceVersion": version,
            "timeoutSeconds": max(1, round(seconds)),
        }
        for line in self._lines(api.path(self.namespace), query, seconds + 15.0, doing=f"watch {_named(api)}"):
            try:
                event = json.loads(line)
            except ValueError as error:  # cut in the middle of an event
                raise StreamLostError(f"watch of {api.plural}: {error}") from error
            if event["type"] == "ERROR":
                raise StreamLostError(f"watch of {api.plural}: {event['object'].get('message')}")
            if event["type"] != "BOOKMARK":
                yield event["type"], event["object"]

    def log(self, pod: str, container: str, **query: Any) -> Iterator[str]:
        """Lines of a container's log.

        Args:
            query: follow, timestamps ("true"), sinceTime (RFC 3339), tailLines, previous.

        Raises:
            StreamLostError: it broke off, or there is none (yet).
            AccessError: not allowed.
        """
        path = PODS.path(self.namespace, pod, "log")
        for line in self._lines(path, {"container": container, **query}, 600.0, doing="get pods/log"):
            yield line.decode("utf-8", "replace")

    def _lines(self, path: str, query: Mapping[str, Any], silent_seconds: float, *, doing: str) -> Iterator[bytes]:
        """Lines as they come; the server may be silent for ``silent_seconds``."""
        import urllib3

        try:
            response = self.once("GET", path, query=query, seconds=silent_seconds, stream=True)
        except ApiError as error:
            if error.status == 403:
                raise self._no_access(error, doing) from error
            if error.status == 401:
                self.reload()
            raise StreamLostError(f"{doing}: {error.status} {error}") from error
        except (OSError, urllib3.exceptions.HTTPError) as error:
            raise StreamLostError(f"{doing}: {error}") from error
        try:
            rest = b""
            for chunk in response.stream(64 * 1024, decode_content=True):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
            if rest:
                yield rest
        except (OSError, urllib3.exceptions.HTTPError) as error:
            raise StreamLostError(f"{doing}: {error}") from error
        finally:
            response.close()  # the rest is not read, so the connection is of no more use
            response.release_conn()

    # -- the cluster --------------------------------------------------------------------------------------------------

    def groups(self) -> set[str]:
        """API groups that the server has."""
        found = self.request("GET", "/apis", doing="get /apis")
        return {group["name"] for group in found["groups"]}

    def training_groups(self) -> set[str]:
        """Of the groups of the two training operators, those with their jobs installed."""
        present = self.groups()
        candidates = (("kubeflow.org", "v1", "pytorchjobs"), ("trainer.kubeflow.org", "v1alpha1", "trainjobs"))
        return {
            group
            for group, version, plural in candidates
            if group in present and plural in self._plurals(group, version)
        }

    def _plurals(self, group: str, version: str) -> set[str]:
        try:
            found = self.request("GET", f"/apis/{group}/{version}", doing=f"get /apis/{group}/{version}")
        except ApiError as error:
            if error.status == 404:
                return set()
            raise
        return {resource["name"] for resource in found["resources"]}

    def allowed(self, verb: str, group: str, resource: str) -> bool:
        """Whether these credentials may, in this namespace; ``resource`` with its subresource: pods/log."""
        plural, _, subresource = resource.partition("/")
        attributes = {
            "namespace": self.namespace,
            "verb": verb,
            "group": group,
            "resource": plural,
            "subresource": subresource,
        }
        review = self.request(
            "POST",
            "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
            doing="create selfsubjectaccessreviews.authorization.k8s.io",
            body={
                "apiVersion": "authorization.k8s.io/v1",
                "kind": "SelfSubjectAccessReview",
                "spec": {"resourceAttributes": attributes},
            },
        )
        return bool(review["status"]["allowed"])


def _named(api: Api) -> str:
    return f"{api.plural}.{api.group}" if api.group else api.plural
