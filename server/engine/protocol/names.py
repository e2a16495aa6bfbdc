"""Every name by which flexgate's processes, and vLLM between them, find each other's data."""

GATE_ARG = "flexgate"  # key of ``SamplingParams.extra_args`` that carries the sealed gate
SEAL_KEY_VARIABLE = "FLEXGATE_SEAL_KEY"  # environment of the engine's processes
TRACES_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"  # with it, vLLM's processes send spans of their own
CONFIG_KEY = "flexgate"  # key of vLLM's ``additional_config``
USAGE_ATTRIBUTE = "expert_usage"  # of a ``ModelRunnerOutput``, where a worker leaves a StepUsage
USAGE_KEY = "flexgate"  # key of ``EngineCoreOutput.kv_transfer_params``
SLOTS_UTILITY = "flexgate_slots"  # name under which the engine core takes :func:`_change_slots`
SELF_TEST = "flexgate-self-test-"  # what the ids of requests begin with that must be refused at every start
MOE_KERNELS_KEY = "flexgate_moe_kernels"  # key of vLLM's ``additional_config``
