"""The engine core's own check: no request enters without a gate sealed for it.

Runs in the engine core process, so that whatever reaches it (a stock vLLM handler that
forgot ``extra_args``, a beam search, a second front end) is refused there, alone, while
the engine lives on.
"""

import logging
import os

from flexgate.server.engine.protocol.clock import Clock
from flexgate.server.engine.protocol.gates import Gate, GateError, SealKey, check, open_seal
from flexgate.server.engine.protocol.names import GATE_ARG, SEAL_KEY_VARIABLE, SELF_TEST
from flexgate.server.engine.protocol.slots import SlotTable
from flexgate.server.engine.seam.engine import EngineCoreRequest

logger = logging.getLogger(__name__)


def seal_key_from_environment() -> SealKey:
    """The key that the launcher handed to this process tree.

    Raises:
        GateError: there is none, so nothing could be verified.
    """
    try:
        return SealKey(bytes.fromhex(os.environ[SEAL_KEY_VARIABLE]))
    except (KeyError, ValueError) as error:
        raise GateError(f"{SEAL_KEY_VARIABLE} is missing or malformed") from error


class _AlreadySaid(logging.Filter):
    """Drops vLLM's traceback for a request that this guard has refused and logged in a line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep everything but reports of a GateError."""
        return not (record.exc_info and isinstance(record.exc_info[1], GateError))


class EngineGuard:
    """Verifies sealed gates and forces the prefix-cache salt that they name."""

    def __init__(self, key: SealKey, table: SlotTable, clock: Clock) -> None:
        """``table`` says which slots are live in this engine, ``clock`` which gates have expired."""
        self.key = key
        self.table = table
        self.clock = clock
        logging.getLogger("vllm.v1.engine.core").addFilter(_AlreadySaid())

    def __call__(self, request: EngineCoreRequest) -> Gate:
        """Return the request's verified gate.

        Raises:
            GateError: the request has no gate, or one that is broken, expired, stale or
                another request's.
        """
        params = request.sampling_params
        sealed = (params.extra_args or {}).get(GATE_ARG) if params is not None else None
        try:
            gate = open_seal(sealed, self.key)
            check(gate, request_id=request.external_req_id or "", now=self.clock())
            self.table.validate(gate)
        except GateError as error:
            expected = request.request_id.startswith(SELF_TEST)
            level = logging.DEBUG if expected else logging.WARNING
            logger.log(level, "refused request %s: %s", request.request_id, error)
            raise
        request.cache_salt = gate.cache_salt
        return gate
