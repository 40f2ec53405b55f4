"""The Kubernetes API, as much of it as following a training job takes: patient with the server, plain in its errors.

Objects are the dictionaries that the API sends. The ``kubernetes`` package finds the server and the credentials; the
requests go over its connection pool, so that every version of it behaves alike.
"""

from __future__ import annotations

import json
import os
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import yaml

from hjepa.errors import HjepaError, UserError
from hjepa.utils.logging import warn

Object = dict[str, Any]

BUDGET_SECONDS = 600.0  # how long the API server may be out of reach
PERSONAL_SECONDS = 60.0  # with a budget up to this a person waits, who can mend what a longer wait does not
_ABSENT_SECONDS = 3.0  # then a server that never answered is a person's mistake, not one that starts again
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 30.0
_LONGEST_PAUSE_SECONDS = 30.0
_POD_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")
ROLE = "manifests/base/launcher-role.yaml"  # what an administrator applies to grant what is missing
# `pods is forbidden: User "x" cannot list ...`; a webhook, a quota and Pod Security speak of no user.
_NO_RIGHT = re.compile(r'(\S+ ("[^"]*" )?is )?forbidden: User "')


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


class NotKubernetesError(ApiError):
    """An answer that no Kubernetes API gives: a login page, a redirection, another service. Told as a bad gateway."""

    def __init__(self, host: str, answer: str):
        super().__init__(
            502, "", f"{host} does not answer like a Kubernetes API: {answer!r}; check the kubeconfig's server"
        )


class UnreachableError(UserError):
    """There is no way to the API server, and waiting makes none."""


class AccessError(UserError):
    """These credentials may not do this (403), or are none (401)."""


class StreamLostError(HjepaError):
    """A watch or a log broke off; what it follows goes on."""


class Cluster:
    """One namespace of a cluster.

    Overload, outages and expired tokens are waited out with growing pauses, at most ``budget_seconds`` for one request.

    Args:
        namespace: By default the pod's own, or the one of the kubeconfig's context.
        budget_seconds: Up to ``PERSONAL_SECONDS``, a server that was never there, or is none, is not waited for.
        patience: Called before each pause with its seconds; by default it sleeps.

    Raises:
        UserError: the package is not installed, or no cluster is configured as it should be.
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
        self._answered = False  # a server has been there
        self.reload()
        if self._plugin and not (self._configuration.cert_file or self._configuration.auth_settings()):
            raise UserError(
                f"{self.source}: the program {self._plugin!r}, which should get the credentials, gives none; run it by "
                "hand, or log in again"
            )

    def another(self) -> Cluster:
        """The same with connections of its own, for a thread that must not wait for a free one."""
        other = Cluster(self.namespace, budget_seconds=self.budget_seconds)
        other._answered = self._answered
        return other

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
        configuration.host = ""  # the package would take localhost where a kubeconfig names no server
        kubeconfig = os.environ.get("KUBECONFIG")
        in_pod = kubeconfig is None and (_POD_FOLDER / "token").exists() and "KUBERNETES_SERVICE_HOST" in os.environ
        self.source = str(_POD_FOLDER) if in_pod else f"kubeconfig {kubeconfig or '~/.kube/config'}"
        self._plugin = ""
        try:
            if in_pod:
                config.load_incluster_config(client_configuration=configuration)
                here = (_POD_FOLDER / "namespace").read_text("utf-8").strip()
            else:
                config.load_kube_config(config_file=kubeconfig, client_configuration=configuration)
                _, context = config.list_kube_config_contexts(config_file=kubeconfig)
                here = str(context["context"].get("namespace") or "default")
                self._plugin = _exec_plugin(kubeconfig, context["context"].get("user"))
            pool = client.ApiClient(configuration).rest_client.pool_manager
        except ConfigException as error:
            raise UserError(
                f"no cluster: {error}. Expected to run in a pod with a service account, or a kubeconfig in "
                "~/.kube/config or where KUBECONFIG says; cluster.backend=local trains on this machine"
            ) from error
        except (yaml.YAMLError, TypeError, ValueError, KeyError, AttributeError, OSError) as error:
            # The package looks into what it has read without a check, so these are the file's faults.
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(
                f"{self.source} cannot be used: {problem}. Expected a file that `kubectl config view` can show; "
                "correct it, or KUBECONFIG"
            ) from error
        if not configuration.host:
            raise UserError(
                f"{self.source} names no server for its current context; `kubectl config set-cluster NAME "
                "--server=https://...` does"
            )
        self.namespace: str = self._asked_namespace or here
        self.host: str = configuration.host.rstrip("/")
        self._configuration = configuration
        self._pool = pool

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        for setting in self._configuration.auth_settings().values():
            if setting.get("in") == "header" and setting.get("value"):
                shown = setting["value"].strip()  # an editor ends a token's file with a line break
                if not (shown.isascii() and shown.isprintable()):  # http.client would quote it in its traceback
                    raise UserError(f"{self.source}: the token holds a character that no token has; write it anew")
                headers[setting["key"]] = shown
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
        needs: str = "kind",
    ) -> Any:
        """One request, one try. ``stream`` returns urllib3's response, unread; otherwise the parsed JSON.

        Args:
            needs: A key that every such answer has.

        Raises:
            ApiError: the server refused, or (NotKubernetesError) it is no API server.
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
        self._answered = True
        if stream and response.status < 300:
            return response
        text = response.data.decode("utf-8", "replace")
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError):
            answer = None
        if response.status >= 400:
            status = answer if isinstance(answer, dict) else {}
            error = ApiError(response.status, status.get("reason", ""), status.get("message") or text or "no message")
            error.retry_after = response.headers.get("Retry-After")  # type: ignore[attr-defined]
            raise error
        if response.status >= 300:
            raise NotKubernetesError(self.host, f"{response.status} {response.headers.get('Location', '')}".rstrip())
        if not isinstance(answer, dict) or needs not in answer:
            raise NotKubernetesError(self.host, text if len(text) < 200 else text[:200] + "...")
        return answer

    def request(self, method: str, path: str, *, doing: str, **options: Any) -> Any:
        """``once``, repeated while the fault is the server's or the way to it.

        Args:
            doing: "create pytorchjobs.kubeflow.org", for the error of a missing right.

        Raises:
            AccessError: not allowed, or not known.
            ApiError: refused for another reason.
            UnreachableError: there is no such server.
            HjepaError: no answer within the budget; or, where a person waits, one that no API server gives.
        """
        import urllib3

        start = time.monotonic()
        end = start + self.budget_seconds
        refused = tries = 0
        while True:
            pause = min(_LONGEST_PAUSE_SECONDS, 0.25 * 2**tries) * random.uniform(0.7, 1.3)
            try:
                return self.once(method, path, **options)
            except NotKubernetesError as error:
                if self.budget_seconds <= PERSONAL_SECONDS:
                    raise HjepaError(str(error)) from error
                problem = str(error)  # a gateway may say so while the server behind it starts
            except ApiError as error:
                if error.status == 401 and refused < 3:
                    refused += 1  # a token of a pod lives an hour; the file has the new one
                    self.reload()
                elif error.status in (401, 403):
                    raise self._no_access(error, doing) from error
                elif error.status != 429 and error.status < 500:
                    raise
                wait = getattr(error, "retry_after", None)
                if wait is not None and wait.isascii() and wait.isdigit():
                    # However long it asks for, there is one more try before the budget ends.
                    pause = max(pause, min(float(wait), end - time.monotonic() - 0.01))
                problem = f"{error.status} {error}"
            except (OSError, urllib3.exceptions.HTTPError) as error:
                problem = f"{type(error).__name__}: {error}"
                if mistake := self._mistake(error, time.monotonic() - start):
                    raise UnreachableError(
                        f"no way to the Kubernetes API at {self.host}, which {self.source} names: {mistake} ({problem})"
                    ) from error
            tries += 1
            if time.monotonic() + pause > end:
                raise HjepaError(
                    f"the Kubernetes API at {self.host} gave no answer to '{doing}' for {self.budget_seconds:.0f} s: "
                    f"{problem}. What runs in the cluster goes on; run this step again to follow it"
                )
            if tries == 4:
                warn(f"the Kubernetes API gives no answer ({problem}); trying for {self.budget_seconds:.0f} s")
            self.patience(pause)

    def _mistake(self, error: Exception, waited: float) -> str:
        """What is wrong with the configuration, if no more waiting mends it; "" for an outage."""
        from urllib3 import exceptions

        if isinstance(error, exceptions.LocationValueError):
            return "expected a server like https://HOST:PORT"
        if self._answered:
            return ""
        if isinstance(error, exceptions.SSLError) and isinstance(error.args[0], ssl.SSLCertVerificationError):
            return "its certificate is not trusted, correct the cluster's certificate-authority or server"
        absent = (exceptions.NewConnectionError, exceptions.ProxyError, exceptions.SSLError)
        personal = self.budget_seconds <= PERSONAL_SECONDS
        if personal and waited >= min(_ABSENT_SECONDS, self.budget_seconds) and isinstance(error, absent):
            return "correct the cluster's server, or start what should listen there"
        return ""

    def _no_access(self, error: ApiError, doing: str) -> HjepaError:
        if error.status == 401:
            return AccessError(
                f"the Kubernetes API at {self.host} does not accept these credentials ('{doing}': {error}); "
                "check the kubeconfig, or the pod's service account"
            )
        if not _NO_RIGHT.match(str(error)):  # an admission webhook, a quota, Pod Security: no right would help
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
                "POST",
                api.path(self.namespace),
                doing=doing,
                body=manifest,
                query={"fieldValidation": "Strict"},
                needs="metadata",
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
            found: Object = self.request(
                "GET", api.path(self.namespace, name), doing=f"get {_named(api)}", needs="metadata"
            )
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found

    def list(self, api: Api, *, labels: str = "", fields: str = "") -> list[Object]:
        query = {key: text for key, text in (("labelSelector", labels), ("fieldSelector", fields)) if text}
        found = self.request("GET", api.path(self.namespace), doing=f"list {_named(api)}", query=query, needs="items")
        items: list[Object] = found["items"] or []
        return items

    def patch(self, api: Api, name: str, patch: Object) -> Object:
        patched: Object = self.request(
            "PATCH",
            api.path(self.namespace, name),
            doing=f"patch {_named(api)}",
            body=patch,
            content="application/merge-patch+json",
            needs="metadata",
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
                kind, what = event["type"], event["object"]
                problem = what.get("message") if kind == "ERROR" else None
            except (ValueError, TypeError, KeyError, AttributeError) as error:  # cut in the middle, or not an event
                raise StreamLostError(f"watch of {api.plural}: {error}: {line[:200]!r}") from error
            if kind == "ERROR":
                raise StreamLostError(f"watch of {api.plural}: {problem}")
            if kind != "BOOKMARK":
                yield kind, what

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
        found = self.request("GET", "/apis", doing="get /apis", needs="groups")
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
            path = f"/apis/{group}/{version}"
            found = self.request("GET", path, doing=f"get {path}", needs="resources")
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
            needs="status",
        )
        return bool(review["status"].get("allowed"))


def _named(api: Api) -> str:
    return f"{api.plural}.{api.group}" if api.group else api.plural


def _exec_plugin(kubeconfig: str | None, user: str | None) -> str:
    """The program that this user's credentials come from; "" if they do not. The package only logs that it failed."""
    from kubernetes.config import kube_config

    merged = kube_config.KubeConfigMerger(kubeconfig or kube_config.KUBE_CONFIG_DEFAULT_LOCATION).config
    entry = merged["users"].get_with_name(user, safe=True) if user and "users" in merged else None
    asked = ((entry.safe_get("user") if entry else None) or {}).get("exec")
    return str(asked["command"]) if asked else ""
