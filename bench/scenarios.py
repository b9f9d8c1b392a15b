"""What is measured, as data: the traffic of each scenario, what is read off it, and the bars.

A variant is one load under which every target is measured; a bar compares the proxy's least value
with nginx's in the same run, or with its own in another variant. side_by_side.py makes the runs,
report.py the tables of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

PROXY = "hoberproxy"
PROXY_WITH_LOG = "hoberproxy, log and limits"
DIRECT = "direct"
REFERENCE = "nginx"  # ratios are to this one


@dataclass(frozen=True, slots=True)
class Traffic:
    """Options of the load generator; None leaves one out. Times in seconds."""

    connections: int
    requests: int = 0  # in all, after the warm-up
    warmup: int = 0  # requests before, which are not counted
    stream: bool = False
    events: int | None = None  # of a stream
    event_bytes: int | None = None  # the mock's are at least 352, plain ones 236
    pace: float | None = None  # between the events of a stream
    block_bytes: int | None = None  # that the mock hands over at once without a pace; 0: each alone
    prompt_bytes: int | None = None
    ramp: float | None = None  # over which the connections start
    new_connection: bool = False
    read_rate: int | None = None  # bytes per second and connection
    duration: float | None = None  # in which requests are begun, where their number is not given
    plain_events: bool = False  # answers without what OpenAI adds: as older results were measured

    def options(self) -> list[str]:
        """As arguments of `bench.load`."""
        arguments: list[str] = []
        for name, value in asdict(self).items():
            option = f"--{name.replace('_', '-')}"
            if value is True:
                arguments.append(option)
            elif value is not None and value is not False and (name, value) != ("requests", 0):
                arguments += (option, f"{value:g}" if isinstance(value, float) else str(value))
        return arguments

    @property
    def seconds(self) -> float:
        """The least time it can take, by its pace, its ramp and its readers."""
        rounds = -(-(self.requests + self.warmup) // self.connections)
        pace = (self.events or 0) * (self.pace or 0.0)
        size = (self.events or 0) * 300  # bytes of an event, or somewhat less
        return (
            (self.duration or 0.0)
            + (self.ramp or 0.0)
            + rounds * max(pace, size / (self.read_rate or 10**9))
        )


class Kind(Enum):
    """How a bar compares."""

    RATIO = "times nginx"
    ADDED = "more than nginx"
    OWN = "times its own"  # in the variant `against`
    MOST = "in all"


@dataclass(frozen=True, slots=True)
class Bar:
    """The most that one value of the proxy may be. `limit_with_log` None: the same."""

    measure: str
    kind: Kind
    limit: float
    limit_with_log: float | None = None
    variant: str = ""
    against: str = ""

    def limit_of(self, target: str) -> float:
        if target == PROXY_WITH_LOG and self.limit_with_log is not None:
            return self.limit_with_log
        return self.limit


@dataclass(frozen=True, slots=True)
class Variant:
    """One load. `steady` seconds are measured alone once all its streams are open."""

    name: str
    traffic: Traffic
    steady: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """`measures` are names in MEASURES; `slope` names two variants for the cost of a prompt KB."""

    name: str
    question: str
    variants: tuple[Variant, ...]
    measures: tuple[str, ...]
    bars: tuple[Bar, ...] = ()
    tls: bool = False  # the upstream speaks https
    dead_first: bool = False  # the first of two endpoints refuses connections
    slope: tuple[str, str] | None = None
    is_saturating: bool = False  # wrk and an upstream in C keep the server's core full


@dataclass(frozen=True, slots=True)
class Measure:
    """A value of one run: where it is in the load generator's report, times `scale`."""

    label: str
    unit: str
    path: tuple[str, ...] = ()  # none: side_by_side.py works it out
    scale: float = 1.0

    def read(self, load: dict[str, Any]) -> float | None:
        """None where the run has no such value."""
        value: Any = load
        for name in self.path:
            value = value.get(name) if isinstance(value, dict) else None
        return value * self.scale if self.path and isinstance(value, int | float) else None


MEASURES = {
    "cpu_request": Measure("CPU per request", "µs", ("server", "cpu_us_per_request")),
    "cpu_event": Measure("CPU per event", "µs", ("server", "cpu_us_per_event")),
    "cpu_prompt_kb": Measure("CPU per extra prompt KB", "µs"),
    "first_p50": Measure("first content p50", "µs", ("first_content_ms", "p50"), 1000.0),
    "first_p99": Measure("first content p99", "µs", ("first_content_ms", "p99"), 1000.0),
    "event_p50": Measure("event delay p50", "µs", ("event_delay_us", "p50")),
    "event_p99": Measure("event delay p99", "µs", ("event_delay_us", "p99")),
    "total_p50": Measure("whole answer p50", "ms", ("total_ms", "p50")),
    "total_p99": Measure("whole answer p99", "ms", ("total_ms", "p99")),
    "requests_second": Measure("requests per second", "1/s", ("requests_per_second",)),
    "cpu_main": Measure("CPU per request, main process", "µs", ("server", "by_role", "main")),
    "cpu_worker": Measure("CPU per request, workers", "µs", ("server", "by_role", "worker")),
    "cpu_writer": Measure("CPU per request, writer", "µs", ("server", "by_role", "writer")),
    "stream_memory": Measure("memory per stream", "KB"),
}

ROLES = ("cpu_main", "cpu_worker", "cpu_writer")  # measures by what a process does

SMALL = Traffic(connections=32, requests=20_000, warmup=1_000)
PACED = Traffic(
    connections=200,
    requests=800,
    warmup=200,
    stream=True,
    events=64,
    event_bytes=240,
    pace=0.02,
    ramp=1.28,  # the length of a stream: ever after, as many end as begin
)
BURST = Traffic(
    connections=50, requests=3_000, warmup=200, stream=True, events=64, event_bytes=240, pace=0.0
)

SATURATING = Traffic(connections=32, duration=5.0)

MANY_EVENTS = 5_000  # a second, over however many streams
MANY_STEADY = 8.0


def many(streams: int, opened_a_second: int = 2_000) -> Variant:
    """The same events a second over so many streams, all open while it is measured."""
    pace = streams / MANY_EVENTS
    ramp = streams / opened_a_second
    events = round((ramp + MANY_STEADY + 6.0) / pace)  # the last to start meets the first to end
    traffic = Traffic(
        connections=streams,
        requests=streams,
        stream=True,
        events=max(events, 2),
        event_bytes=240,
        pace=pace,
        ramp=ramp,
    )
    return Variant(f"{streams:,} streams", traffic, steady=MANY_STEADY)


def large(prompt_bytes: int, requests: int) -> Variant:
    traffic = Traffic(
        connections=8, requests=requests, warmup=requests // 10, prompt_bytes=prompt_bytes
    )
    return Variant(f"{prompt_bytes // 1000:,} KB", traffic)


SCENARIOS = (
    Scenario(
        "json",
        "what a small request costs that is answered in one piece",
        (Variant("", SMALL),),
        ("cpu_request", "total_p50"),
        (Bar("cpu_request", Kind.RATIO, 2.0, limit_with_log=2.75),),
    ),
    Scenario(
        "paced",
        "what an event costs when each comes alone: 200 streams, 20 ms between their events",
        (Variant("", PACED),),
        ("cpu_event", "event_p50", "event_p99"),
        (Bar("cpu_event", Kind.RATIO, 1.2),),
    ),
    Scenario(
        "burst",
        "what an event costs when they come without a pace, each with its own write",
        (
            Variant("each alone", replace(BURST, block_bytes=0)),
            Variant("in blocks of 64 KB", BURST),  # as no model server does: for comparison
        ),
        ("cpu_event", "total_p50"),
        (Bar("cpu_event", Kind.RATIO, 1.3, variant="each alone"),),
    ),
    Scenario(
        "delay",
        "how much later a client sees the first content and each event: 20 streams",
        (Variant("", replace(PACED, connections=20, requests=200, warmup=20)),),
        ("first_p50", "first_p99", "event_p50", "event_p99"),
        (
            Bar("first_p50", Kind.ADDED, 50.0),
            Bar("event_p50", Kind.ADDED, 50.0),
        ),
    ),
    Scenario(
        "many",
        f"whether it matters over how many open streams {MANY_EVENTS:,} events a second come",
        (many(100), many(1_000), many(10_000)),
        ("cpu_event", "event_p50", "event_p99", "stream_memory"),
        (
            Bar("cpu_event", Kind.OWN, 1.3, variant="10,000 streams", against="100 streams"),
            Bar("stream_memory", Kind.MOST, 15.0, variant="10,000 streams"),
        ),
    ),
    Scenario(
        "many-tls",
        "the memory of open streams from an https upstream",
        (many(10_000, opened_a_second=400),),  # whose handshakes take both sides their time
        ("cpu_event", "stream_memory"),
        (Bar("stream_memory", Kind.MOST, 60.0, variant="10,000 streams"),),
        tls=True,
    ),
    Scenario(
        "large",
        "what each further KB of a prompt costs",
        (large(1_000, 6_000), large(10_000, 6_000), large(100_000, 2_000), large(1_000_000, 300)),
        ("cpu_request", "cpu_prompt_kb"),
        (Bar("cpu_prompt_kb", Kind.RATIO, 3.0, variant="1 KB to 1,000 KB"),),
        slope=("1 KB", "1,000 KB"),
    ),
    Scenario(
        "slow-reader",
        "what is held for clients that read slower than their model writes",
        (
            Variant(
                "20 readers of 100 KB/s",
                Traffic(
                    connections=20,
                    requests=20,
                    stream=True,
                    events=2_000,
                    event_bytes=240,
                    pace=0.0,
                    read_rate=100_000,
                ),
            ),
        ),
        ("stream_memory", "cpu_event"),
    ),
    Scenario(
        "churn",
        "what a small request costs on a connection of its own",
        (Variant("", replace(SMALL, requests=5_000, warmup=200, new_connection=True)),),
        ("cpu_request", "total_p50"),
    ),
    Scenario(
        "failover",
        "what a small request costs while the first of two endpoints is dead",
        (Variant("", SMALL),),
        ("cpu_request", "total_p50"),
        dead_first=True,
    ),
    Scenario(
        "json-tls",
        "json, from an https upstream",
        (Variant("", SMALL),),
        ("cpu_request", "total_p50"),
        (Bar("cpu_request", Kind.RATIO, 2.5),),
        tls=True,
    ),
    Scenario(
        "paced-tls",
        "paced, from an https upstream",
        (Variant("", PACED),),
        ("cpu_event", "event_p50", "event_p99"),
        (Bar("cpu_event", Kind.RATIO, 1.3),),
        tls=True,
    ),
    Scenario(
        "saturation",
        "what a request costs, and how long it takes, while the server's core is full",
        (
            Variant("json, prompt of 30 bytes", replace(SATURATING, prompt_bytes=30)),
            Variant("json, prompt of 1 KB", replace(SATURATING, prompt_bytes=1_000)),
            Variant(
                "burst, prompt of 30 bytes",
                replace(SATURATING, prompt_bytes=30, stream=True, events=64, event_bytes=240),
            ),
            Variant(
                "burst, prompt of 1 KB",
                replace(SATURATING, prompt_bytes=1_000, stream=True, events=64, event_bytes=240),
            ),
        ),
        (
            "cpu_request",
            *ROLES,
            "requests_second",
            "total_p50",
            "total_p99",
        ),
        is_saturating=True,
    ),
)


def shortened(variant: Variant) -> Variant:
    """The same in a second or two, to see that it works: its figures mean nothing."""
    traffic = variant.traffic
    connections = min(traffic.connections, 20)
    traffic = replace(
        traffic,
        connections=connections,
        requests=min(traffic.requests, (1 if variant.steady else 2) * connections),
        duration=traffic.duration and 1.0,
        warmup=min(traffic.warmup, 2),
        events=traffic.events and (150 if variant.steady else min(traffic.events, 8)),
        pace=traffic.pace and 0.01,
        ramp=traffic.ramp and 0.05,
    )
    return replace(variant, traffic=traffic, steady=min(variant.steady, 0.3))


def limited(variant: Variant, most_connections: int) -> Variant:
    """The same with no more connections than the machine lets one process have."""
    traffic = variant.traffic
    if traffic.connections <= most_connections:
        return variant
    requests = traffic.requests if traffic.requests > traffic.connections else most_connections
    return replace(
        variant, traffic=replace(traffic, connections=most_connections, requests=requests)
    )
