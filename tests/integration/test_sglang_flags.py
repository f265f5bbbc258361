"""Flags as read from SGLang's source, against those of SGLang's own parser."""

import json
import subprocess
import sys

from megatron_vespo.rollout.server_arguments import known_flags

TIMEOUT_S = 180
PARSER = """
import argparse, json
from sglang.srt.server_args import ServerArgs

parser = argparse.ArgumentParser(add_help=False)
ServerArgs.add_cli_args(parser)
found = {}
for action in parser._actions:
    values = "optional" if action.nargs == "?" else "one" if action.nargs is None else "many"
    found |= dict.fromkeys(action.option_strings, "none" if action.nargs == 0 else values)
print("FLAGS", json.dumps(found))
"""


def test_the_source_says_what_the_parser_says():
    command = [sys.executable, "-c", PARSER]
    output = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    (line,) = (line for line in output.splitlines() if line.startswith("FLAGS "))
    assert known_flags() == json.loads(line.removeprefix("FLAGS "))
