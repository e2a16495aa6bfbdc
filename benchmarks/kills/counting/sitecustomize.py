"""Count what an engine core takes and generates, in a file that a kill does not take back; for `kills.usage` alone.

Every process of a server reads this at its start; only the one that imports vLLM's scheduler counts. A line is written
before what it counts leaves the scheduler: `takes ENGINE_REQUEST PROMPT_LENGTH TOKEN,TOKEN` with the last tokens of
the prompt, and `generates ENGINE_REQUEST TOKENS`.
"""

import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

SCHEDULER = "vllm.v1.core.sched.scheduler"
LAST = 2  # tokens of a prompt, which name its request


class _Counting(Loader):
    """Loads the scheduler, and counts what its methods are given and return."""

    def __init__(self, loader, file):
        self._loader, self._file = loader, file

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        scheduler, file = module.Scheduler, self._file
        add, update = scheduler.add_request, scheduler.update_from_output

        def add_request(self, request):
            prompt = request.prompt_token_ids
            last = ",".join(map(str, prompt[-LAST:]))
            os.write(file, f"takes {request.request_id} {len(prompt)} {last}\n".encode())
            add(self, request)

        def update_from_output(self, *args, **kwargs):
            outputs = update(self, *args, **kwargs)
            lines = [
                f"generates {output.request_id} {len(output.new_token_ids)}\n"
                for batch in outputs.values()
                for output in batch.outputs
                if output.new_token_ids
            ]
            os.write(file, "".join(lines).encode())
            return outputs

        scheduler.add_request, scheduler.update_from_output = add_request, update_from_output


class _Finder(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != SCHEDULER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        file = os.open(os.environ["FLEXGATE_COUNTED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        spec.loader = _Counting(spec.loader, file)
        return spec


if "FLEXGATE_COUNTED" in os.environ:
    sys.meta_path.insert(0, _Finder())
