# hoberproxy, compiled, without the compiler. How to run it: deploy/README.md.

# Debian keeps the newest version of a package alone: pinned ones would soon be gone.
FROM debian:trixie-slim AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
# pip stays here: the program's environment has none.
RUN python3 -m venv /build && python3 -m venv --without-pip /opt/hoberproxy
WORKDIR /src
COPY pyproject.toml hatch_build.py README.md CHANGELOG.md LICENSE ./
COPY bench bench
COPY hoberproxy hoberproxy
RUN HOBERPROXY_BUILD=compiled /build/bin/pip --python /opt/hoberproxy/bin/python \
    install --no-cache-dir .

FROM debian:trixie-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /var/lib/hoberproxy \
        --shell /usr/sbin/nologin hoberproxy \
    && install -d -o hoberproxy -g hoberproxy -m 700 /var/lib/hoberproxy \
    && install -d /etc/hoberproxy
COPY --from=build /opt/hoberproxy /opt/hoberproxy
ENV PATH=/opt/hoberproxy/bin:$PATH
# By number, so that it is seen not to be root. Keys and records are in the working directory.
USER 10001:10001
WORKDIR /var/lib/hoberproxy
VOLUME ["/var/lib/hoberproxy"]
EXPOSE 8080 9464
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["hoberproxy"]
CMD ["serve", "--config", "/etc/hoberproxy/hoberproxy.toml", "--listen", "0.0.0.0:8080"]
