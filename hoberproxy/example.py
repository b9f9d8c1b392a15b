"""The config that `hoberproxy config --example` prints: one to start from.

What is commented out in it shows the defaults; a test holds them to the code.
"""

from __future__ import annotations

EXAMPLE = """\
# hoberproxy.toml. A setting behind "#" shows its default. All of them: docs/settings.md

[server]
#listen = ["127.0.0.1:8080"]
#metrics_listen = "127.0.0.1:9464"
# for `hoberproxy status`; "" is beside the records file
#admin_socket = ""
#max_body_bytes = 33554432
# bytes of all bodies under way; 0 is a quarter of the machine's memory
#max_body_memory = 0
# seconds
#head_timeout = 10
#body_timeout = 60
#keepalive_timeout = 75
#write_timeout = 300
#drain_timeout = 600
# comment lines to streams that wait, so that no balancer cuts them; 0 is never
#comment_after = 10
#cors_origins = []
# over it new requests are refused with 503, running ones go on; 0 is no limit
#max_streams = 10000
# providers behind wildcards are asked for their models so often; 0 is never
#models_refresh = 600

[keys]
# make one with: hoberproxy keys create --label NAME
#required = true
# tokens held of limits for an answer that neither its request nor a max_output limits
#assumed_output = 8192

[records]
#file = "hoberproxy.db"
# days that single records are kept; 0 is for good
#keep_days = 0

# one request over all its endpoints; no attempt begins after the timeout, in seconds
[routing]
#max_attempts = 6
#attempts_timeout = 900

[log]
#level = "info"
#access = true
#format = "auto"
# share of the lines of requests without a failure; failures are always logged
#sample = 1

# A provider that hoberproxy knows: address, variable of the key and quirks come from the preset.
[providers.deepseek]
preset = "deepseek"

# Any other that speaks OpenAI's API. Keys are read from a variable or a file, never written here.
[providers.example]
base_url = "https://models.example.com/v1"
api_key_env = "EXAMPLE_API_KEY"
headers = { x-title = "hoberproxy" }
#forward_headers = []
#response_headers = []
#stream_options = true
#keepalive = 60
#max_idle_connections = 1024
# What this server does not take as OpenAI has it. An endpoint may say otherwise for itself.
vision = false
rename = { max_completion_tokens = "max_tokens" }
#drop = []
#set = {}
#roles = {}

# seconds of one attempt
[providers.example.limits]
#connect = 5
#first_content = 300
#idle = 120
#total = 1800

# A model, and the endpoints that serve it, in the order they are tried.
[[models]]
slug = "deepseek/deepseek-chat"
context_length = 131072

[[models.endpoints]]
provider = "deepseek"
model = "deepseek-chat"
max_output = 8192
# USD per million tokens; also cached, cache_write, reasoning, and request (USD each)
price = { prompt = "0.14", completion = "0.28" }

[[models.endpoints]]
provider = "example"
price = { prompt = "0.20", completion = "0.30" }
limits = { first_content = 30 }

# Every model of a provider without listing them: example/NAME is NAME there.
[[models]]
slug = "example/*"
endpoints = [{ provider = "example" }]
"""
