"""Report what `hoberproxy check --live` found out of an endpoint, with advice for each problem.

Of an upstream's answer a report holds only the status, of a connection the system's error.
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
UNKNOWN = "-"


@dataclass(slots=True)
class Report:
    """The result for one endpoint, times in seconds; `problems` are lines with advice."""

    model: str
    provider: str
    reachable: str = UNKNOWN  # "yes", or "no (…)" with a status or a word
    first_content: float | None = None  # from the first try to connect
    throughput: float | None = None  # tokens per second after the first
    tools: str = UNKNOWN  # "yes", "no call", "refused", "failed" or "cut"
    json_mode: str = UNKNOWN  # "yes", "no JSON", "refused", "failed" or "cut"
    usage: str = UNKNOWN  # "yes" or "no", of the stream
    problems: list[str] = field(default_factory=list)

    @property
    def is_unreachable(self) -> bool:
        """Return whether the endpoint was tried and did not answer."""
        return self.reachable.startswith("no")

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the texts of this report's row, one for each of COLUMNS."""
        first = UNKNOWN if self.first_content is None else f"{self.first_content * 1000:,.0f} ms"
        speed = UNKNOWN if self.throughput is None else f"{self.throughput:,.0f}"
        abilities = (self.tools, self.json_mode, self.usage)
        return (self.model, self.provider, self.reachable, first, speed, *abilities)

    def note(self, problem: str) -> None:
        """Add `problem` with the name of the endpoint."""
        self.problems.append(f"{self.model} at {self.provider}: {problem}")

    def fail(self, error: UpstreamError) -> None:
        """Report that `error` makes the endpoint unreachable."""
        word, advice = _describe(error)
        self.reachable = f"no ({word})"
        self.note(advice)

    def note_ability(self, setting: str, verdict: str, configured: bool | None) -> None:
        """Advise to set `setting` if `verdict` says that the endpoint lacks the ability."""
        if verdict == "failed":
            self.note(f"{setting}: the request failed; check again later")
        elif verdict == "cut":
            self.note(f"{setting}: the answer was cut too early to say; try it by hand")
        elif verdict != "yes" and configured is not False:
            self.note(f"{setting}: {verdict}; set {setting} = false for the endpoint")


# What to do about a failure

_ADVICE = {
    401: "the key is not accepted; check the provider's api_key_env or api_key_file",
    402: "the account has no credit; add some, or take the endpoint out",
    403: "the key may not do this; check its rights and the account's access to the model",
    404: "model or path unknown; check the endpoint's model, and that base_url ends in the version",
    429: "a rate limit is reached; check again later",
}
_OTHER_ADVICE = {
    2: "the answer is incomplete or no completion; check that base_url ends in the version (/v1)",
    3: "the server redirects; put the final address into base_url",
    4: "the server refuses the request; check the endpoint's model, rename, drop and set",
    5: "the server failed; look into its log, or check again later",
}


def _describe(error: UpstreamError) -> tuple[str, str]:
    """Return a word or a status for `error`, and what to do about it."""
    status = error.upstream_status
    if error.code == "upstream_timeout":
        if error.phase is Phase.CONNECT:
            return "time limit", "no connection in time; check host, port and firewalls"
        return "time limit", "no answer in time; set a longer --timeout, or check the server's load"
    if error.phase is Phase.CONNECT:
        return _describe_connect(error.__cause__)
    if status is None:
        return (
            "cut",
            "the connection ended without an answer; check whether base_url needs http or https",
        )
    return str(status), f"status {status}: {_ADVICE.get(status) or _OTHER_ADVICE[status // 100]}"


def _describe_connect(cause: BaseException | None) -> tuple[str, str]:
    if isinstance(cause, ssl.SSLCertVerificationError):
        return "certificate", f"{describe_os_error(cause)}; set ca_file to its authority"
    if isinstance(cause, ssl.SSLError):
        return "TLS", "no TLS in common; check whether base_url needs http or https"
    if isinstance(cause, socket.gaierror):
        return "name", "no address for this name; check the host in base_url"
    if isinstance(cause, ConnectionRefusedError):
        return "refused", "nothing listens there; start the server, or check the port in base_url"
    return "connect", "no connection; check host and port in base_url"
