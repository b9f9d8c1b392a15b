"""What `hoberproxy check --live` tells of an endpoint, and what to do about what is wrong.

All words are ours: of an upstream's answer only its status is told, of a connection what the system
says. How endpoints are asked is in cli/live_check.py.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field

from ..errors import Phase, UpstreamError
from ..upstream.connector import describe_os_error

COLUMNS = (
    "model", "provider", "reachable", "first content", "tokens/s", "tools", "JSON mode", "usage",
)  # fmt: skip
NOT_ASKED = "-"


@dataclass(slots=True)
class Report:
    """What is known of one endpoint. Times in seconds; `problems` say what to do, one a line."""

    model: str
    provider: str
    reachable: str = NOT_ASKED  # "yes", or "no (…)" with a status or a word
    first_content: float | None = None  # from the first try to connect
    throughput: float | None = None  # tokens per second after the first
    tools: str = NOT_ASKED  # "yes", "no call", "refused", "failed" or "cut"
    json_mode: str = NOT_ASKED  # "yes", "no JSON", "refused", "failed" or "cut"
    usage: str = NOT_ASKED  # "yes" or "no", of the stream
    problems: list[str] = field(default_factory=list)

    @property
    def is_unreachable(self) -> bool:
        """It was asked, and nothing came of it."""
        return self.reachable.startswith("no")

    @property
    def cells(self) -> tuple[str, ...]:
        """One text for each of COLUMNS."""
        first = NOT_ASKED if self.first_content is None else f"{self.first_content * 1000:,.0f} ms"
        speed = NOT_ASKED if self.throughput is None else f"{self.throughput:,.0f}"
        abilities = (self.tools, self.json_mode, self.usage)
        return (self.model, self.provider, self.reachable, first, speed, *abilities)

    def note(self, problem: str) -> None:
        self.problems.append(f"{self.model} at {self.provider}: {problem}")

    def fail(self, error: UpstreamError) -> None:
        shortly, advice = _describe(error)
        self.reachable = f"no ({shortly})"
        self.note(advice)

    def note_ability(self, setting: str, verdict: str, configured: bool | None) -> None:
        """Tell what routing had better know."""
        if verdict == "failed":
            self.note(f"{setting}: the request failed; ask again later")
        elif verdict == "cut":
            self.note(f"{setting}: the answer was cut before it could show; ask it by hand")
        elif verdict != "yes" and configured is not False:
            self.note(f"{setting}: {verdict}; set {setting} = false for the endpoint")


# What to do about a failure

_ADVICE = {
    401: "the key is not accepted; check the provider's api_key_env or api_key_file",
    402: "the account has no credit; see to it, or take the endpoint out",
    403: "the key may not do this; check its rights, and the account's to the model",
    404: "model or path unknown; check the endpoint's model, and that base_url ends in the version",
    429: "a rate limit is reached; ask again later",
}
_OTHER_ADVICE = {
    2: "the answer is no completion, or broke; check that base_url ends in the version (/v1)",
    3: "it redirects; put the final address into base_url",
    4: "it refuses the request; check the endpoint's model, rename, drop and set",
    5: "it fails itself; look into its log, or ask again later",
}


def _describe(error: UpstreamError) -> tuple[str, str]:
    """The failure in a word or a status, and what to do about it."""
    status = error.upstream_status
    if error.code == "upstream_timeout":
        if error.phase is Phase.CONNECT:
            return "time limit", "no connection in time; check host, port and what is between"
        return "time limit", "no answer in time; give it a longer --timeout, or look at its load"
    if error.phase is Phase.CONNECT:
        return _describe_connect(error.__cause__)
    if status is None:
        return "cut", "the connection ended without an answer; check that base_url is http or https"
    return str(status), f"status {status}: {_ADVICE.get(status) or _OTHER_ADVICE[status // 100]}"


def _describe_connect(cause: BaseException | None) -> tuple[str, str]:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "certificate", f"{describe_os_error(cause)}; name its authority in ca_file"
    if isinstance(cause, ssl.SSLError):
        return "TLS", "it does not speak TLS as we do; check that base_url is http or https"
    if isinstance(cause, socket.gaierror):
        return "name", "the name is not found; check the host in base_url"
    if isinstance(cause, ConnectionRefusedError):
        return "refused", "nothing listens there; start it, or check the port in base_url"
    return "connect", "no connection; check host and port in base_url"
